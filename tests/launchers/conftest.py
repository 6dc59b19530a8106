"""YAML file of a run for all launcher tests: tiny model without images, tensor 2 x pipeline 2, three steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

STEPS = 3


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("launchers")
    turns = [{"from": "human", "value": "colours?"}, {"from": "gpt", "value": "red green blue"}]
    (root / "annotations.json").write_text(
        json.dumps([{"id": str(number), "conversations": turns} for number in range(STEPS * 4)])
    )
    train_tokenizer(["what colours? red green blue USER: ASSISTANT:"] * 50, root / "tokenizer.model", vocab_size=300)
    prepare(
        PrepareOptions(
            annotations=root / "annotations.json",
            images=root,
            output=root / "data",
            tokenizer=root / "tokenizer.model",
            max_text_length=200,
        )
    )
    content = {
        "run": {"directory": str(root / "unset"), "seed": 5},
        "model": {
            "base": str(repository / "examples" / "models" / "tiny.yaml"),
            "language": {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 300},
        },
        "parallel": {"tensor": 2, "pipeline": 2, "sequence": True},
        "precision": {"dtype": "fp32"},
        "ops": "reference",
        "data": {
            "train": str(root / "data"),
            "tokenizer": str(root / "tokenizer.model"),
            "max_text_length": 200,
            "num_workers": 0,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 1, "steps": STEPS},
        "log": {"tensorboard": False, "sample_keys": True},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    return root / "run.yaml"
