"""Fixtures of the fault tests: a small data set, a run's YAML file and a reference run without faults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from fault_injection import train
from launching import lines
from PIL import Image

STEPS, EVERY, BATCH = 8, 3, 4
EXACT = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples", "trained_tokens")


@dataclass(frozen=True)
class FaultRuns:
    """Inputs of the fault tests. root: directory of all runs; reference: EXACT metrics of a run without faults."""

    root: Path
    config: Path
    reference: list[list[float]]

    def curve(self, directory: Path) -> list[list[float]]:
        """Return the metrics of each step that must be bitwise equal."""
        return curve(directory)


def curve(directory: Path) -> list[list[float]]:
    return [[line[name] for name in EXACT] for line in lines(directory / "metrics.jsonl")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> FaultRuns:
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("faults")
    (root / "images").mkdir()
    records = []
    for number in range(STEPS * BATCH):
        Image.new("RGB", (20, 30), (7 * number % 256, 2 * number, 90)).save(root / "images" / f"{number}.png")
        answer = " ".join(["red", "green", "blue"][(number + i) % 3] for i in range(2 + number % 5))
        turns = [
            {"from": "human", "value": "<image>\nwhat colours?" if number % 4 else "colours?"},
            {"from": "gpt", "value": answer},
        ]
        records.append(
            {"id": f"s{number}", "conversations": turns} | ({"image": f"{number}.png"} if number % 4 else {})
        )
    (root / "annotations.json").write_text(json.dumps(records))
    train_tokenizer(["what colours? red green blue USER: ASSISTANT:"] * 50, root / "tokenizer.model", vocab_size=300)
    prepare(
        PrepareOptions(
            annotations=root / "annotations.json",
            images=root / "images",
            output=root / "data",
            tokenizer=root / "tokenizer.model",
            max_text_length=200,
        )
    )
    tiny = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    content = {
        "run": {"directory": str(root / "reference"), "seed": 5},
        "model": {
            "base": str(repository / "examples" / "models" / "tiny.yaml"),
            "language": {**tiny, "vocab_size": 300},
        },
        "precision": {"dtype": "fp32"},
        "ops": "reference",
        "data": {
            "train": str(root / "data"),
            "tokenizer": str(root / "tokenizer.model"),
            "max_text_length": 200,
            "num_workers": 0,
        },
        "optim": {"learning_rate": 1e-3},
        "train": {"global_batch_size": BATCH, "micro_batch_size": 1, "steps": STEPS},
        "checkpoint": {"every_steps": EVERY},
        "log": {"tensorboard": False, "sample_keys": True},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    reference = train(root / "run.yaml", 2)
    assert reference.codes == [0, 0], reference.output
    return FaultRuns(root, root / "run.yaml", curve(root / "reference"))
