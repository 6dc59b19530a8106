"""Convergence of a short quickstart stage 1: native and reference ops give the same curve within summation order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run_world
from tolerances import BF16_CURVE, FP32_CURVE

from megatron_share4v.ops.build import find_toolchain

STEPS = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the quickstart captions of a few scenes."""
    from examples.quickstart.dataset import write_dataset
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("curves")
    write_dataset(root / "scenes", train_scenes=160, held_out_scenes=64, seed=3, image_size=72)
    annotations = root / "scenes" / "pretrain.json"
    train_tokenizer(
        [turn["value"] for record in json.loads(annotations.read_text()) for turn in record["conversations"]],
        root / "tokenizer.model",
        vocab_size=400,
    )
    prepare(
        PrepareOptions(
            annotations=annotations,
            images=root / "scenes",
            output=root / "data",
            tokenizer=root / "tokenizer.model",
            template="plain",
            max_text_length=384,
            max_rejected_fraction=0.0,
            workers=0,
        )
    )
    return root


def curves(root: Path, config: Path, dtype: str, variants: list[tuple[str, int]]) -> list[list[float]]:
    """Return losses by step for each (ops, micro-batch size), in this process."""
    from megatron_share4v.config.load import load_run
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout
    from megatron_share4v.train.build import build
    from megatron_share4v.train.loop import train

    found = []
    for ops, micro_batch in variants:
        directory = root / f"{dtype}-{ops}-{micro_batch}"
        overrides = {
            "run.directory": directory,
            "ops": ops,
            "precision.dtype": dtype,
            "data.train": root / "data",
            "data.validation": "null",
            "data.tokenizer": root / "tokenizer.model",
            "parallel.tensor": 1,
            "parallel.pipeline": 1,
            "train.steps": STEPS,
            "train.global_batch_size": 8,
            "train.micro_batch_size": micro_batch,
            "train.validate_every_steps": 0,
            "train.preview_every_steps": 0,
            "checkpoint.every_steps": 0,
            "log.tensorboard": "false",
        }
        with open_mesh(Layout(), device=Device("cpu")) as mesh:
            train(build(load_run(config, [f"{key}={value}" for key, value in overrides.items()]), mesh=mesh))
        found.append([json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()])
    return found


@pytest.mark.skipif(find_toolchain() is None, reason="no C++ compiler on PATH")
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", FP32_CURVE), ("bf16", BF16_CURVE)])
def test_native_ops_converge_like_reference_ops(dtype: str, tolerance: float, data: Path, repository: Path) -> None:
    config = repository / "examples" / "quickstart" / "pretrain.yaml"
    [(native, reference)] = run_world(1, curves, data, config, dtype, [("native", 8), ("reference", 8)])
    assert len(native) == len(reference) == STEPS
    assert native != reference, "both ran the same"
    assert max(reference[-8:]) < 0.2 * reference[0], "little is learned: the curves say little"
    furthest = max(abs(a - b) for a, b in zip(native, reference, strict=True))
    print(f"\n{dtype}: {reference[0]:.3f} -> {reference[-1]:.3f}, the curves are {furthest:.2g} apart at most")
    assert furthest <= tolerance, furthest
