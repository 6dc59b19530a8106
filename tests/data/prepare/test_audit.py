"""Data audit: each kind of finding is reported, counts agree with hand-counted numbers, exit codes."""

import dataclasses
import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_hf_tokenizer import write_qwen_like

from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.prepare.annotations import AnnotationFile
from megatron_share4v.data.prepare.audit import FACTS, AnnotationSource, AuditResult, DatasetSource, audit_records
from megatron_share4v.data.prepare.audit_report import (
    BatchShape,
    estimate_packing,
    estimate_padding,
    format_report,
    sample_lengths,
)
from megatron_share4v.data.prepare.audit_samples import format_sample
from megatron_share4v.data.prepare.image_files import ImageFiles
from megatron_share4v.data.prepare.validate import RecordValidator
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.data.records import Sample, Turn
from megatron_share4v.data.sampling.orders import modality_length_order, random_order
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.logging import get_logger
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import get_template

TOOL = Path(__file__).parents[3] / "tools" / "doctor.py"


@pytest.fixture(scope="module")
def examine(prepared) -> RecordValidator:
    images = ImageFiles(prepared.images, archives=(), table=None)
    return RecordValidator(
        images, SentencePieceTokenizer(prepared.tokenizer_path), get_template("vicuna_v1"), 512, keep_bytes=False
    )


@pytest.fixture
def bad(prepared, tmp_path: Path, picture) -> Path:
    """Folder with annotations.json and images: 24 good records and one record for each finding."""
    shutil.copytree(prepared.images, tmp_path / "images")
    coco = tmp_path / "images" / "coco"
    (coco / "half.png").write_bytes(picture(3)[:100])
    (coco / "strip.png").write_bytes(picture(3, size=(1809, 9)))
    shutil.copy(coco / "1.png", coco / "copy.png")
    question, answer = {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a red circle"}
    about = lambda image, *turns, id="x": {
        "id": id,
        "image": f"coco/{image}.png",
        "conversations": list(turns or (question, answer)),
    }
    text = lambda id, *values: {
        "id": id,
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)],
    }
    records = prepared.records + [
        about("none", id="a"), about("half", id="b"), about("strip", id="c"),
        about("0", {"from": "human", "value": "what?"}, answer, id="d"), about("0", question, question, id="e"),
        text("f", "what " * 600, "red"), text("g", "what?", "red " * 600), text("h", "what is an <image>?", "red"), 5,
        about("copy", id="i"), about("0", id="j"), about("0", id="k"), text("j", "why?", "so"),
    ]  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    return tmp_path


WANTED = {
    "missing image": 1,
    "corrupt image": 1,
    "oversized image": 1,
    "placeholder mismatch": 2,
    "bad record": 1,
    "no label": 1,
    "truncated answer": 1,
    "placeholder without image": 1,
    "equal images": 1,
    "repeated record": 1,
    "repeated id": 1,
}


def _audit(folder: Path, examine: RecordValidator, **named) -> AuditResult:
    examine = dataclasses.replace(examine, images=ImageFiles(folder / "images", archives=(), table=None))
    return audit_records(AnnotationSource(AnnotationFile(folder / "annotations.json"), examine), workers=0, **named)


def test_every_kind_is_found(bad: Path, examine: RecordValidator):
    found = []
    result = _audit(bad, examine, on_finding=found.append)
    assert dict(result.counts) == WANTED, found
    assert (result.records, len(result.facts)) == (37, 29)
    by_kind = {finding.kind: finding for finding in found}
    assert by_kind["truncated answer"].where == "annotations.json, record 30 (id 'g')"
    assert "trained positions are truncated" in by_kind["truncated answer"].reason
    assert by_kind["equal images"].reason.endswith("as record 1") and by_kind["repeated record"].where == "record 35"
    assert by_kind["repeated id"].where == "record 36"
    assert result.duplicates.shared == 2
    assert [finding.kind for finding in result.examples["placeholder mismatch"]] == ["placeholder mismatch"] * 2
    assert len(_audit(bad, examine, examples=1).examples["placeholder mismatch"]) == 1


def test_numbers_agree_with_the_index(prepared, examine: RecordValidator):
    records = AnnotationSource(AnnotationFile(prepared.annotations), examine)
    result = audit_records(records, workers=2)
    rows = prepared.index.rows
    assert not result.counts
    for name in ("n_tok", "n_lab", "words", "n_img", "width", "height"):
        assert np.array_equal(result.facts[name], rows[name])
    assert sample_lengths(result, BatchShape(tokens_per_image=10))[0] == rows[0]["n_tok"] + 9


def test_a_prepared_data_set_is_verified(prepared, examine: RecordValidator, tmp_path: Path):
    copy = Path(shutil.copytree(prepared.directory, tmp_path / "copy"))
    clean = audit_records(DatasetSource(SampleReader(Index.open(copy)), examine), workers=0)
    assert (clean.records, len(clean.facts), dict(clean.counts)) == (24, 24, {})
    index = Index.open(copy)
    path = copy / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[int(index.rows[6]["image_offset"]) + 30] ^= 1
    path.write_bytes(data)
    shorter = dataclasses.replace(examine, max_text_length=int(index.rows[0]["n_tok"]) - 1)
    damaged = audit_records(DatasetSource(SampleReader(index), shorter), workers=0)
    [finding] = damaged.examples["damaged sample"]
    assert finding.where == "shard-000001.tar:img_6" and "crc32 is" in finding.reason
    assert damaged.counts["outdated index"] > 0 and "n_tok is" in damaged.examples["outdated index"][0].reason


def _lengths(lengths: list[int], *, images: int = 0) -> AuditResult:
    facts = np.zeros(len(lengths), dtype=FACTS)
    facts["n_tok"] = facts["full_tok"] = lengths
    facts["n_lab"] = facts["full_lab"] = 1
    facts["words"] = lengths
    facts["n_img"][:images] = 1
    return AuditResult(records=len(lengths), facts=facts, sources=["x"])


def test_padding_and_packing_are_what_a_hand_counts():
    result = _lengths([8, 16] * 8)
    shape = BatchShape(tokens_per_image=1, micro_batch_size=2, global_batch_size=4, pad_multiple=8, pack_length=24)
    for found in estimate_padding(result, shape):
        order = modality_length_order(result.facts["words"], group_size=4, batch_size=2, seed=0, epoch=0)
        order = order if found.order == "group_by_modality_length" else random_order(16, seed=0, epoch=0)
        lengths = [(8, 16)[row % 2] for row in order]
        for share, size in ((found.micro_batch, 2), (found.step, 4)):
            padded = sum(max(lengths[start : start + size]) * size for start in range(0, 16, size))
            assert share == pytest.approx(1 - 8 * 24 / padded)
    packs = estimate_packing(result, shape)
    assert (packs.packs, packs.fill, packs.samples_per_pack, packs.too_long) == (8, 1.0, 2.0, 0)
    assert estimate_packing(result, dataclasses.replace(shape, pack_length=10)).too_long == 8
    assert estimate_padding(result, dataclasses.replace(shape, global_batch_size=32)) == []


def test_report_says_it_all(bad: Path, examine: RecordValidator):
    text = format_report(
        _audit(bad, examine),
        BatchShape(tokens_per_image=4, global_batch_size=8, pack_length=512),
        allowed=["truncated answer"],
    )
    assert text.startswith("37 records, 29 can be trained, 9 findings\n")
    assert "1 truncated answer (allowed)" in text and "1 repeated id (information)" in text
    assert "1 missing image\n" in text and "2 samples share another's image" in text
    assert "keys that are not read" not in text
    for words in (
        "source ",
        "coco ",
        "text-only ",
        "longer side in pixels",
        "padding, micro-batch 8, global batch 8",
        "packing to 512: ",
        "1 samples are cut",
    ):
        assert words in text
    assert format_report(AuditResult(), BatchShape()).startswith("0 records, 0 can be trained, 0 findings")


def test_a_sample_as_the_model_sees_it(examine: RecordValidator):
    turns = (Turn("human", "<image>\nwhat is it?"), Turn("gpt", "a red\x1b[2J circle"))
    sample = Sample(key="k", turns=turns, image=None, has_image=True, shard="s")
    named = {
        "tokenizer": examine.tokenizer,
        "template": examine.template,
        "max_text_length": 512,
        "tokens_per_image": 576,
    }
    plain = format_sample(sample, colour=False, **named)
    assert (
        plain.startswith("--- s:k: ")
        and "USER: <image: 576 positions> \nwhat is it? ASSISTANT:[[ a red\\x1b[2J circle</s>]]" in plain
    )
    assert "\033[1;32m a red\\x1b[2J circle</s>\033[0m" in format_sample(sample, colour=True, **named)


@pytest.fixture
def command() -> Iterator[Callable[[list[object]], int]]:
    """Function `main` of the tool; restores the logging set-up afterwards."""
    logger = get_logger()
    before = logger.level, logger.propagate
    main = runpy.run_path(str(TOOL))["main"]
    yield lambda arguments: main([str(argument) for argument in arguments])
    logger.level, logger.propagate = before
    logger.handlers.clear()


def test_the_command(bad: Path, prepared, command, capsys):
    annotated = [
        "data",
        "--annotations",
        bad / "annotations.json",
        "--images",
        bad / "images",
        "--tokenizer",
        prepared.tokenizer_path,
    ]
    shape = [
        "--max-text-length",
        512,
        "--workers",
        0,
        "--image-size",
        28,
        "--tokens-per-image",
        4,
        "--show",
        8,
        "--out",
        bad / "out",
    ]
    assert command([*annotated, *shape]) == 1
    out = capsys.readouterr().out
    assert out.count("--- ") == 8 and "[[" in out and "37 records" in out
    assert len((bad / "out" / "findings.jsonl").read_text().splitlines()) == sum(WANTED.values())
    assert (bad / "out" / "report.txt").read_text() in out
    assert Image.open(bad / "out" / "lengths.png").size == (900, 420)
    for path in (bad / "out").glob("sample-*.png"):
        number = int(path.stem.split("-")[1])
        records = json.loads((bad / "annotations.json").read_text())
        wanted = decode((bad / "images" / records[number]["image"]).read_bytes(), ImagePolicy(image_size=28))
        assert np.array_equal(np.asarray(Image.open(path)), wanted)
    allowed = [text for kind in WANTED for text in ("--allow", kind)]
    assert command([*annotated, *shape, *allowed]) == 0


def test_numbers_come_from_the_run(bad: Path, prepared, tmp_path: Path, command, capsys):
    """The tour's command: duplicates are information, and an image has the positions of the run's tower."""
    records = prepared.records + [prepared.records[1], {**prepared.records[2], "weight": 2, "model": ""}]
    (tmp_path / "a.json").write_text("\n".join(json.dumps(record) for record in records))
    text = (TOOL.parents[1] / "examples/quickstart/finetune.yaml").read_text()
    text = text.replace("runs/quickstart/tokenizer.model", str(prepared.tokenizer_path))
    text = text.replace("../models", str(TOOL.parents[1] / "examples/models"))
    (tmp_path / "run.yaml").write_text(text)
    arguments = ["data", "--annotations", tmp_path / "a.json", "--images", prepared.images, "--workers", 0]
    assert command([*arguments, "--config", tmp_path / "run.yaml", "--show", 1, "--out", tmp_path / "out"]) == 0
    out = capsys.readouterr().out
    assert "an image is 36 positions and 72 x 72 pixels, as in " in out and "<image: 36 positions>" in out
    assert "36 positions per image" in out and "template    vicuna_v1, answers end with </s>" in out
    assert "26 records, 26 can be trained, 0 findings" in out and "2 repeated record (information)" in out
    assert "keys that are not read: 'weight' in 1 records" in out and "micro-batch 12, global batch 24" in out
    assert Image.open(next((tmp_path / "out").glob("sample-*.png"))).size == (72, 72)
    with pytest.raises(SystemExit, match="2"):
        command(arguments)
    assert "give --tokenizer, or --config" in capsys.readouterr().err
    assert command([*arguments, "--config", tmp_path / "none.yaml"]) == 2


def test_the_command_on_a_prepared_directory(prepared, tmp_path: Path, command, capsys):
    arguments = ["data", prepared.directory, "--tokenizer", prepared.tokenizer_path, "--workers", 0, "--out", tmp_path]
    assert command(arguments) == 0
    assert "24 records, 24 can be trained, 0 findings" in capsys.readouterr().out
    assert command([*arguments, "--template", "plain"]) == 2
    assert "template is plain, prepared with vicuna_v1" in capsys.readouterr().err
    assert command(["data", tmp_path / "none", *arguments[2:]]) == 2
    for wrong in (
        ["data", *arguments[2:]],
        [*arguments, "--micro-batch-size", 3],
        [*arguments, "--annotations", "x.json"],
    ):
        with pytest.raises(SystemExit, match="2"):
            command(wrong)


def test_trained_markers_of_a_prepared_directory(prepared, tmp_path: Path, command, capsys):
    tokenizer = write_qwen_like(tmp_path / "tokenizer")
    prepare(
        PrepareOptions(
            annotations=prepared.annotations,
            images=prepared.images,
            output=tmp_path / "data",
            tokenizer=tokenizer,
            template="qwen_1_5",
            trained_markers="official",
        )
    )
    arguments = ["data", tmp_path / "data", "--tokenizer", tokenizer, "--workers", 0, "--out", tmp_path / "report"]
    assert command(arguments) == command([*arguments, "--trained-markers", "official"]) == 0
    assert command([*arguments, "--trained-markers", "answer_only"]) == 2
    assert "trained_markers is answer_only, prepared with official" in capsys.readouterr().err


def test_prepare_and_doctor_agree(bad: Path, prepared, examine: RecordValidator):
    options = PrepareOptions(
        annotations=bad / "annotations.json",
        images=bad / "images",
        output=bad / "out",
        tokenizer=prepared.tokenizer_path,
        max_text_length=512,
        max_rejected_fraction=0.5,
    )
    summary = prepare(options)
    looked_at = _audit(bad, examine)
    assert summary.samples == len(looked_at.facts)
    assert summary.rejected == {kind: count for kind, count in looked_at.counts.items() if kind in summary.rejected}
    assert sum(summary.rejected.values()) == looked_at.refused.total()
