"""Training on shards with 5 % damaged samples: TP 2 x PP 2 finishes, lists them, and equals a run on one rank."""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import finish, fork, lines
from PIL import Image

STEPS, BATCH = 6, 16
T2P2 = ("parallel.tensor=2", "parallel.pipeline=2", "data.num_workers=1")


def decompression_bomb() -> bytes:
    """Return a small PNG whose header claims 60000 x 60000 pixels."""
    content = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + content


# Kind of damage -> (member, change of its bytes, whether the crc32 of the index is updated, part of the reason).
DAMAGE = {
    "bits flipped in an image": (
        "image",
        lambda data: data[:40] + bytes([data[40] ^ 16]) + data[41:],
        False,
        "crc32 is",
    ),
    "bits flipped in a text": ("text", lambda data: b"[" + data[1:], False, "crc32 is"),
    "zeros": ("image", lambda data: bytes(len(data)), True, "image cannot be read"),
    "truncated": (
        "image",
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        True,
        "image cannot be decoded",
    ),
    "decompression_bomb": (
        "image",
        lambda data: decompression_bomb() + bytes(len(data) - len(decompression_bomb())),
        True,
        "more pixels than are accepted, 64000000",
    ),
}


@dataclass(frozen=True)
class Bench:
    """Shared runs below `root`; damaged: sample key -> part of its reason."""

    root: Path
    config: Path
    damaged: dict[str, str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Bench:
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("damaged")
    (root / "images").mkdir()
    records = []
    for number in range(STEPS * BATCH):
        pixels = np.random.RandomState(number).randint(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        answer = " ".join(["red", "green", "blue"][(number + i) % 3] for i in range(2 + number % 5))
        turns = [
            {"from": "human", "value": "<image>\nwhat colours?" if number % 4 else "colours?"},
            {"from": "gpt", "value": answer},
        ]
        records.append({"id": str(number), "conversations": turns} | ({"image": f"{number}.png"} if number % 4 else {}))
    (root / "annotations.json").write_text(json.dumps(records))
    train_tokenizer(["what colours? red green blue USER: ASSISTANT:"] * 50, root / "tokenizer.model", vocab_size=300)
    prepare(
        PrepareOptions(
            annotations=root / "annotations.json",
            images=root / "images",
            output=root / "data",
            tokenizer=root / "tokenizer.model",
            max_text_length=200,
            samples_per_shard=40,
        )
    )
    content = {
        "run": {"directory": str(root / "unset"), "seed": 5},
        "model": {
            "base": str(repository / "examples" / "models" / "tiny.yaml"),
            "language": {"vocab_size": 300},
            "trainable": {"vision_from_block": 1},
        },
        "precision": {"dtype": "fp32"},
        "data": {
            "train": str(root / "data"),
            "validation": str(root / "data"),
            "tokenizer": str(root / "tokenizer.model"),
            "max_text_length": 200,
            "order": "sequential",
            "num_workers": 0,
            "max_faulty_fraction": 0.1,
        },
        "train": {
            "global_batch_size": BATCH,
            "micro_batch_size": 4,
            "steps": STEPS,
            "validate_every_steps": 3,
            "validation_batches": 1,
            "preview_every_steps": STEPS,
            "preview_tokens": 2,
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    return Bench(root, root / "run.yaml", _damage(root / "data"))


def _damage(directory: Path) -> dict[str, str]:
    """Damage samples of steps 1, 2, 3 and 5, including the first image, which previews would show."""
    from megatron_share4v.data.store.index import Index, write_index

    index = Index.open(directory)
    rows, keys = np.array(index.rows), np.load(directory / "keys.npy")
    damaged = {}
    for (member, change, agree, reason), row in zip(DAMAGE.values(), (1, 18, 21, 35, 70)):
        shard = "image_shard" if member == "image" else "shard"
        path = directory / index.info.shards[int(rows[row][shard])].name
        start, length = int(rows[row][f"{member}_offset"]), int(rows[row][f"{member}_length"])
        content = bytearray(path.read_bytes())
        changed = change(bytes(content[start : start + length]))
        assert len(changed) == length
        content[start : start + length] = changed
        path.write_bytes(content)
        if agree:
            rows[row][f"{member}_crc32"] = zlib.crc32(changed)
        damaged[f"{path.name}:{index.key(row)}"] = reason
    write_index(directory, rows=rows, keys=keys, info=index.info)
    return damaged


def test_damaged_samples_are_quarantined_equally_at_every_layout(bench: Bench) -> None:
    four, one = bench.root / "four", bench.root / "one"
    for ranks, directory, overrides in ((4, four, T2P2), (1, one, ())):
        output = finish(fork(bench.config, ranks, f"run.directory={directory}", *overrides))
        assert "their slots are kept without labels" in output and "validation: 1 samples could not be read" in output
    listed = lines(four / "quarantine.jsonl")
    assert [line["sample"] for line in listed] == list(bench.damaged) and [line["step"] for line in listed] == [
        1,
        2,
        2,
        3,
        5,
    ]
    assert all(re.search(bench.damaged[line["sample"]], line["reason"]) for line in listed), listed
    assert lines(one / "quarantine.jsonl") == listed
    actual, reference = lines(four / "metrics.jsonl"), lines(one / "metrics.jsonl")
    assert [line["faulty_samples"] for line in actual] == [1, 2, 1, 0, 1, 0]
    for left, right in zip(actual, reference, strict=True):
        assert left["trained_tokens"] == right["trained_tokens"] and abs(left["loss"] - right["loss"]) < 2e-5
    assert json.loads((four / "image_backend.json").read_text())["backend"] == "pil"


def test_too_many_damaged_samples_end_the_run(bench: Bench) -> None:
    directory = bench.root / "ended"
    process = fork(
        bench.config,
        4,
        f"run.directory={directory}",
        *T2P2,
        "data.max_faulty_fraction=0.0",
        "data.image_backend=torch_u8",
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2 and "Traceback" not in output.partition("error: ")[0], output
    first = next(iter(bench.damaged))
    assert f"error: rank 0: 1 of {BATCH} samples could not be read" in output and f"\n  {first}: crc32 is" in output
    assert [line["sample"] for line in lines(directory / "quarantine.jsonl")] == [first]
    record = json.loads((directory / "image_backend.json").read_text())
    assert record["backend"] == "torch_u8" and record["gate"]["max_error"] <= 2 and record["gate"]["images"] >= 12
    assert 0.999 < record["gate"]["cosine"] <= 1.00001
    assert "image backend torch_u8: against pil on" in output
