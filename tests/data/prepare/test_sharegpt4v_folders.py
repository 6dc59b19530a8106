"""The whole ShareGPT4V layout in small: eleven source folders, partly as the archives that are published, and its three files of annotations.

The commands of docs/data.md are run on it as they are written there, but for their directories.
"""

import json
import re
import runpy
import shlex
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.logging import get_logger

ROOT = Path(__file__).parents[3]
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line
]
PRETRAIN, FINETUNE = (
    "share-captioner_coco_lcs_sam_1246k_1107.json",
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
)
CAPTIONS = "sharegpt4v_instruct_gpt4-vision_cap100k.json"
FOLDERS = {
    "coco": "coco/train2017", "llava": "llava/llava_pretrain/images/00453", "sam": "sam/images", "gqa": "gqa/images", "ocr_vqa": "ocr_vqa/images",
    "textvqa": "textvqa/train_images", "vg": "vg/VG_100K", "share_textvqa": "share_textvqa/images", "web-celebrity": "web-celebrity/images",
    "web-landmark": "web-landmark/images", "wikiart": "wikiart/images",
}  # fmt: skip
IN_CAPTIONS = ("coco", "llava", "sam", "share_textvqa", "web-celebrity", "web-landmark", "wikiart")
EACH = 3


def _turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


@pytest.fixture
def layout(
    tmp_path: Path, tokenizer_path: Path, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """data/ and weights/ as docs/data.md says; the working directory is above them."""
    data = tmp_path / "data"
    paths = {}
    for source, folder in FOLDERS.items():
        (data / folder).mkdir(parents=True)
        paths[source] = [f"{folder}/{number:09d}.jpg" for number in range(EACH)]
        for number, path in enumerate(paths[source]):
            (data / path).write_bytes(
                picture(len(paths) * 10 + number, format="GIF" if source == "ocr_vqa" and number == 1 else "JPEG")
            )
    other = data / "vg" / "VG_100K_2"
    other.mkdir()
    shutil.copy(data / paths["vg"][0], other / "7.jpg")
    _pack(data)
    captions = [
        {
            "id": Path(path).stem,
            "image": path,
            "conversations": _turns("<image>\nWhat do you see?", "a red circle left of a square. " * 9),
        }
        for source in IN_CAPTIONS
        for path in paths[source]
    ]
    pretrain = [record for record in captions if record["image"].split("/")[0] in ("coco", "llava", "sam")]
    mix = [
        {
            "id": f"{source}-{number}",
            "image": path,
            "conversations": _turns("What is it?\n<image>", "red", "Where?", "left"),
        }
        for source in FOLDERS
        for number, path in enumerate(paths[source])
    ]
    mix += [
        {"id": "coco-again", "image": paths["coco"][0], "conversations": _turns("<image>\nWhat is small?", "a star")}
    ]
    mix += [
        {
            "id": "vg2",
            "image": "vg/VG_100K_2/7.jpg",
            "conversations": _turns("<image>\nWhere is the star?", "[0.1,0.2,0.3,0.4]"),
        }
    ]
    mix += [
        {"id": f"text{number}", "model": "", "conversations": _turns("what is large?", "the square " * number)}
        for number in (1, 2, 3)
    ]
    mix += [
        {"id": "gone", "image": "web-celebrity/images/gone.jpg", "conversations": _turns("<image>\nWho?", "nobody")}
    ]
    (data / "sharegpt4v").mkdir()
    for name, records in ((PRETRAIN, pretrain), (FINETUNE, mix), (CAPTIONS, captions)):
        (data / "sharegpt4v" / name).write_text(json.dumps(records))
    weights = tmp_path / "weights" / "vicuna-7b-v1.5"
    weights.mkdir(parents=True)
    shutil.copy(tokenizer_path, weights / "tokenizer.model")
    monkeypatch.chdir(tmp_path)
    return data


def _pack(data: Path) -> None:
    """Some sources as they are published: SA-1B in tar files with masks beside the images, LCS and GQA as zip."""
    with tarfile.open(data / "sam" / "images" / "sa_000000.tar", "w") as tar:
        for path in sorted((data / "sam" / "images").glob("*.jpg")):
            tar.add(path, f"./{path.name}")
            path.unlink()
    for archive, folder, opens_with in (
        ("llava/llava_pretrain/images.zip", "llava/llava_pretrain/images", ""),
        ("gqa/images.zip", "gqa/images", "images/"),
    ):
        with zipfile.ZipFile(data / archive, "w", zipfile.ZIP_STORED) as target:
            for path in sorted((data / folder).rglob("*.jpg")):
                target.write(path, opens_with + path.relative_to(data / folder).as_posix())
        shutil.rmtree(data / folder)


@pytest.fixture
def run() -> Iterator[Callable[[str], int]]:
    """Runs one documented command, here and without worker processes; the logging that it sets up is undone."""
    logger = get_logger()
    before = logger.level, logger.propagate

    def run_command(line: str) -> int:
        python, tool, *arguments = shlex.split(line)
        assert python == "python"
        return runpy.run_path(str(ROOT / tool))["main"]([*arguments, "--workers", "0"])

    yield run_command
    logger.level, logger.propagate = before
    logger.handlers.clear()


def _command(*words: str) -> str:
    [line] = [line for line in COMMANDS if all(word in line for word in words)]
    return line


def test_one_command_prepares_stage_1(layout: Path, run):
    assert run(_command("prepare_data", PRETRAIN, "pretrain_1246k")) == 0
    index = Index.open(layout / "sharegpt4v" / "pretrain_1246k")
    assert {name: (count.samples, count.rejected, count.images) for name, count in index.info.sources.items()} == {
        "coco": (3, 0, 3), "llava": (3, 0, 3), "sam": (3, 0, 3),
    }  # fmt: skip
    assert index.info.template == "plain"
    store = SampleReader(index)
    assert all(store.read(row, with_image=True).image for row in range(9))


def test_one_command_prepares_stage_2(layout: Path, run):
    assert (
        run(_command("prepare_data", PRETRAIN, "pretrain_1246k")) == 0
    )  # its shards lie below data/ and are not taken for archives of images
    assert run(_command("prepare_data", FINETUNE, "finetune_665k ")) == 0
    out = layout / "sharegpt4v" / "finetune_665k"
    index = Index.open(out)
    counts = {name: (count.samples, count.rejected, count.images) for name, count in index.info.sources.items()}
    assert len(FOLDERS) == 11
    assert counts == dict.fromkeys(FOLDERS, (EACH, 0, EACH)) | {
        "coco": (4, 0, 3), "vg": (4, 0, 4), "web-celebrity": (3, 1, 3), "text-only": (3, 0, 0),
    }  # fmt: skip
    [line] = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == "web-celebrity/images/gone.jpg"
    duplicates = [json.loads(line) for line in (out / "duplicates.jsonl").read_text().splitlines()]
    assert duplicates == [{"kind": "image", "keys": ["vg-0", "vg2"]}]
    with tarfile.open(out / "shard-000000.tar") as tar:
        assert "ocr_vqa-1.gif" in tar.getnames()  # named .jpg where it was published


def test_the_other_commands(layout: Path, run, capsys):
    assert run(_command("prepare_data", CAPTIONS)) == 0
    assert run(_command("doctor", "--annotations", FINETUNE)) == 1
    assert "1 missing image" in capsys.readouterr().out
    assert run(_command("prepare_data", FINETUNE, "finetune_665k ")) == 0
    assert run(_command("doctor", "data/sharegpt4v/finetune_665k")) == 1
    assert "1 equal images" in capsys.readouterr().out
    assert run(_command("prepare_data", "--in-place")) == 0
    copied, left = (
        SampleReader(Index.open(layout / "sharegpt4v" / name)) for name in ("finetune_665k", "finetune_665k_in_place")
    )
    assert [left.read(row, with_image=True) for row in range(len(left.index))] == [
        copied.read(row, with_image=True) for row in range(len(copied.index))
    ]


def test_every_command_of_the_document_is_run_here():
    tools = [shlex.split(line)[1] for line in COMMANDS]
    assert sorted(tools) == ["tools/doctor.py"] * 2 + ["tools/prepare_data.py"] * 4
    assert all((ROOT / tool).is_file() for tool in tools)
