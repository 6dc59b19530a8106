"""Elastic resume: a packed, blended run killed twice and resumed at other layouts trains the same samples."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from launching import finish, fork, killed_after, lines
from PIL import Image
from tiny_tokenizer import WORDS

STEPS = 60


@dataclass(frozen=True)
class Bench:
    """Prepared data sets and the YAML file of a run."""

    root: Path
    config: Path


def sentence(number: int) -> str:
    """Return some words that depend on `number`."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(3 + number % 30))


def record(number: int, images: Path, source: str) -> dict:
    """Return a conversation of one round; three of four have an image."""
    turns, fields = [sentence(number + 1), sentence(number)], {"id": f"{source}{number}"}
    if number % 4:
        Image.new("RGB", (20, 30), (number, 2 * number, 90)).save(images / f"{source}{number}.png")
        turns[0], fields["image"] = f"<image>\n{turns[0]}", f"{source}{number}.png"
    return fields | {"conversations": [{"from": role, "value": turn} for role, turn in zip(("human", "gpt"), turns)]}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Bench:
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("elastic")
    (root / "images").mkdir()
    texts = [sentence(number) for number in range(200)]
    train_tokenizer(texts, root / "tokenizer.model", vocab_size=300)
    for name, count in (("captions", 90), ("questions", 70)):
        annotations = root / f"{name}.json"
        annotations.write_text(json.dumps([record(number, root / "images", name) for number in range(count)]))
        prepare(
            PrepareOptions(
                annotations=annotations,
                images=root / "images",
                output=root / name,
                tokenizer=root / "tokenizer.model",
                max_text_length=400,
                max_rejected_fraction=0.0,
            )
        )
    content = {
        "run": {"directory": str(root / "unset"), "seed": 5},
        "model": {
            "base": str(repository / "examples" / "models" / "tiny.yaml"),
            "language": {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64},
        },
        "precision": {"dtype": "fp32"},
        "data": {
            "train": [{"path": str(root / "captions"), "epochs": 1.5}, {"path": str(root / "questions")}],
            "tokenizer": str(root / "tokenizer.model"),
            "max_text_length": 400,
            "pack_length": 512,
            "num_workers": 0,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 1, "steps": STEPS},
        "checkpoint": {"every_steps": 6},
        "log": {"sample_keys": True, "tensorboard": False},
    }
    config = root / "run.yaml"
    config.write_text(yaml.safe_dump(content))
    return Bench(root, config)


def kill_after(step: int, bench: Bench, ranks: int, *overrides: str) -> None:
    """Start a run and kill all its ranks after `step` steps."""
    process = fork(bench.config, ranks, *overrides, script=killed_after(step))
    output, _ = process.communicate(timeout=500)
    assert process.returncode == -signal.SIGKILL, output


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> Path:
    directory = bench.root / "uninterrupted"
    output = finish(fork(bench.config, 2, f"run.directory={directory}"))
    assert "packs of 512 positions" in output and "1.5 times per epoch" in output
    return directory


def test_resume_at_other_cp_and_dp_sizes_keeps_the_sample_order(bench: Bench, uninterrupted: Path) -> None:
    first, second = random.randint(7, 25), random.randint(32, 50)
    print("killed after steps", first, second)
    directory = bench.root / "interrupted"
    kill_after(first, bench, 2, f"run.directory={directory}", "parallel.context=2")
    kill_after(second, bench, 1, f"run.directory={directory}", "data.num_workers=2")
    assert len(lines(directory / "samples.jsonl")) == second
    output = finish(fork(bench.config, 4, f"run.directory={directory}", "parallel.context=2"))
    assert "data 2 x context 2" in output and "resumed from" in output
    actual, reference = lines(directory / "samples.jsonl"), lines(uninterrupted / "samples.jsonl")
    assert len(reference) == STEPS and actual == reference
    keys = [key for line in reference for key in line["keys"]]
    assert {key.split(":")[0] for key in keys} == {"captions", "questions"}
    for one, other in zip(lines(directory / "metrics.jsonl"), lines(uninterrupted / "metrics.jsonl"), strict=True):
        for name in ("step", "consumed_samples", "consumed_by_source", "trained_tokens", "tokens", "images"):
            assert one[name] == other[name]
    last = lines(uninterrupted / "metrics.jsonl")[-1]
    assert last["consumed_samples"] == len(keys) == sum(last["consumed_by_source"].values())
    # The last pack of each of these small data sets is partly empty.
    assert sum(line["padding_fraction"] for line in lines(uninterrupted / "metrics.jsonl")) / STEPS < 0.3


def test_changed_data_settings_are_refused(bench: Bench, uninterrupted: Path) -> None:
    changes = (
        "data.order=sequential",
        "data.image_aspect_ratio=square",
        f"train.steps={STEPS + 1}",
        "checkpoint.accept_changes=true",
        f"run.directory={uninterrupted}",
    )
    process = fork(bench.config, 1, *changes)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "order: was random, is sequential; image policy aspect_ratio: was pad, is square." in output
    assert "checkpoint.allow_data_change" in output
    output = finish(fork(bench.config, 1, *changes, "checkpoint.allow_data_change=true"))
    assert "training goes on. order: was random, is sequential" in output and f"step {STEPS + 1}/" in output
    [change] = lines(uninterrupted / "data_changes.jsonl")
    assert change["step"] == STEPS and change["changes"][0] == "order: was random, is sequential"
