"""parallel.overlap_tensor: arguments passed to Transformer Engine, checked with a fake of the supported version."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.precision import PrecisionConfig
from megatron_share4v.config.run import RunConfig, RunSection
from megatron_share4v.config.training import TrainConfig
from megatron_share4v.mcore.layer_config import language_config, vision_config
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.mcore.tp_comm_overlap import initialize_tp_comm_overlap
from megatron_share4v.parallel.layout import Layout

ON = ParallelConfig(tensor=2, sequence=True, overlap_tensor=True)
MESH = SimpleNamespace(layout=Layout(tensor=2), device=SimpleNamespace(backend="nccl"))


def run(
    *,
    parallel: ParallelConfig = ON,
    engine: Any = "language",
    pack_length: int | None = 4096,
    preview: int = 0,
    **precision: Any,
) -> RunConfig:
    return RunConfig(
        run=RunSection(directory="runs/none"),
        parallel=parallel,
        precision=PrecisionConfig(**precision),
        transformer_engine=engine,
        data=DataConfig(train="data", tokenizer="tokenizer.model", pack_length=pack_length),
        train=TrainConfig(global_batch_size=4, micro_batch_size=2, preview_every_steps=preview),
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Buffers requested from Transformer Engine."""
    calls: list[dict[str, Any]] = []

    def initialize_ub(
        shape,
        tp_size,
        use_fp8=False,
        quantization_modes=None,
        dtype=torch.bfloat16,
        ub_cfgs=None,
        bootstrap_backend=None,
        with_cublasmp=False,
    ):
        calls.append(
            {
                "shape": shape,
                "tp_size": tp_size,
                "modes": quantization_modes,
                "dtype": dtype,
                "backend": bootstrap_backend,
            }
        )

    engine = ModuleType("transformer_engine.pytorch")
    engine.initialize_ub, engine.UserBufferQuantizationMode = initialize_ub, SimpleNamespace(FP8="fp8", NONE="none")
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    return calls


@pytest.mark.parametrize(
    ("precision", "modes"),
    [
        ({}, ["none"]),
        ({"fp8": "tensorwise"}, ["fp8"]),
        ({"fp8": "tensorwise", "fp8_first_layers": 1}, ["fp8", "none"]),
        ({"fp8": "delayed", "guard_every_steps": 10}, ["fp8", "none"]),
    ],
)
def test_buffers_are_allocated_once_per_micro_batch_size(
    precision: dict, modes: list[str], made: list[dict[str, Any]]
) -> None:
    initialize_tp_comm_overlap(run(**precision), mesh=MESH)
    assert made == [
        {"shape": [2 * 4096, 4096], "tp_size": 2, "modes": modes, "dtype": torch.bfloat16, "backend": "nccl"}
    ]


def test_no_buffers_without_overlap(made: list[dict[str, Any]]) -> None:
    initialize_tp_comm_overlap(run(parallel=replace(ON, overlap_tensor=False)), mesh=MESH)
    assert not made


def test_core_overlaps_only_in_the_language_model() -> None:
    """The tower has no sequence parallelism, without which Transformer Engine overlaps nothing."""
    for on in (True, False):
        how = {
            "parallel": replace(ON, overlap_tensor=on),
            "dtype": torch.bfloat16,
            "ops": "reference",
            "options": LayerOptions(transformer_engine="all"),
        }
        assert language_config(ModelConfig(), layers_per_stage=(32,), **how).tp_comm_overlap is on
        assert vision_config(ModelConfig(), **how).tp_comm_overlap is False


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"parallel": ParallelConfig(tensor=2, sequence=True, overlap_tensor=True), "engine": "none"},
            "with transformer_engine none: its layers",
        ),
        ({"pack_length": None}, "with data.pack_length null: the buffers have one shape"),
        ({"fp8": "blockwise"}, "with precision.fp8 blockwise: there are no buffers for scales of blocks"),
        ({"dtype": "fp32"}, "with precision.dtype fp32: the buffers are for bf16 and FP8"),
        ({"preview": 10}, "with train.preview_every_steps 10: generation has other shapes"),
        (
            {"fp8": "delayed", "fp8_param_gather": True},
            "fp8_param_gather true is not available: megatron-core has it only for weights that",
        ),
    ],
)
def test_unsupported_options_raise(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**wrong)


def test_overlap_needs_sequence_parallelism() -> None:
    with pytest.raises(
        ValueError, match="overlap_tensor true needs tensor > 1 and sequence true, got tensor 2 and sequence false"
    ):
        ParallelConfig(tensor=2, overlap_tensor=True)
