"""Commands of docs/data.md on a small copy of the ShareGPT4V layout: eleven image sources and three annotation files.

Some sources are in archives, as published.
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
    "coco": "coco/train2017",
    "llava": "llava/llava_pretrain/images/00453",
    "sam": "sam/images",
    "gqa": "gqa/images",
    "ocr_vqa": "ocr_vqa/images",
    "textvqa": "textvqa/train_images",
    "vg": "vg/VG_100K",
    "share_textvqa": "share_textvqa/images",
    "web-celebrity": "web-celebrity/images",
    "web-landmark": "web-landmark/images",
    "wikiart": "wikiart/images",
}
IN_CAPTIONS = ("coco", "llava", "sam", "share_textvqa", "web-celebrity", "web-landmark", "wikiart")
EACH = 3


def _record(name: str, image: str | None, *values: str) -> dict[str, object]:
    """Return an annotation whose messages alternate between human and gpt; text only without an image."""
    messages = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"id": name} | ({"image": image} if image else {"model": ""}) | {"conversations": messages}


def _annotations(paths: dict[str, list[str]]) -> dict[str, list[dict[str, object]]]:
    """Return the records of each annotation file for the image paths of each source."""
    answer = "a red circle left of a square. " * 9
    captions = [
        _record(Path(path).stem, path, "<image>\nWhat do you see?", answer)
        for source in IN_CAPTIONS
        for path in paths[source]
    ]
    pretrain = [record for record in captions if str(record["image"]).split("/")[0] in ("coco", "llava", "sam")]
    mix = [
        _record(f"{source}-{number}", path, "What is it?\n<image>", "red", "Where?", "left")
        for source in FOLDERS
        for number, path in enumerate(paths[source])
    ]
    mix += [
        _record("coco-again", paths["coco"][0], "<image>\nWhat is small?", "a star"),
        _record("vg2", "vg/VG_100K_2/7.jpg", "<image>\nWhere is the star?", "[0.1,0.2,0.3,0.4]"),
        *(_record(f"text{number}", None, "what is large?", "the square " * number) for number in (1, 2, 3)),
        _record("gone", "web-celebrity/images/gone.jpg", "<image>\nWho?", "nobody"),
    ]
    return {PRETRAIN: pretrain, FINETUNE: mix, CAPTIONS: captions}


@pytest.fixture
def layout(
    tmp_path: Path, tokenizer_path: Path, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Directories data/ and weights/ as described in docs/data.md, in the working directory; returns data/."""
    data = tmp_path / "data"
    paths: dict[str, list[str]] = {}
    for source, folder in FOLDERS.items():
        (data / folder).mkdir(parents=True)
        paths[source] = [f"{folder}/{number:09d}.jpg" for number in range(EACH)]
        for number, path in enumerate(paths[source]):
            format = "GIF" if source == "ocr_vqa" and number == 1 else "JPEG"
            (data / path).write_bytes(picture(len(paths) * 10 + number, format=format))
    other = data / "vg" / "VG_100K_2"
    other.mkdir()
    shutil.copy(data / paths["vg"][0], other / "7.jpg")
    _pack(data)
    (data / "sharegpt4v").mkdir()
    for name, records in _annotations(paths).items():
        (data / "sharegpt4v" / name).write_text(json.dumps(records))
    weights = tmp_path / "weights" / "vicuna-7b-v1.5"
    weights.mkdir(parents=True)
    shutil.copy(tokenizer_path, weights / "tokenizer.model")
    monkeypatch.chdir(tmp_path)
    return data


def _pack(data: Path) -> None:
    """Pack some sources as they are published: SA-1B as tar, LCS and GQA as zip."""
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
    """Run a documented command in this process without workers; restore the logging set-up afterwards."""
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
    # The shards of stage 1 lie below data/ and must not be read as image archives.
    assert run(_command("prepare_data", PRETRAIN, "pretrain_1246k")) == 0
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
        assert "ocr_vqa-1.gif" in tar.getnames()  # published with the suffix .jpg


def test_the_other_commands(layout: Path, run, capsys):
    assert run(_command("prepare_data", CAPTIONS)) == 0
    assert run(_command("doctor", "--annotations", FINETUNE)) == 1
    assert "1 missing image" in capsys.readouterr().out
    assert run(_command("prepare_data", FINETUNE, "finetune_665k ")) == 0
    assert run(_command("doctor", "data/sharegpt4v/finetune_665k")) == 0
    assert "1 equal images (information)" in capsys.readouterr().out
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
