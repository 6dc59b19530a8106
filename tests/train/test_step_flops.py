"""FLOPs of a step: 6 x parameters x tokens, savings of freezing, and hardware FLOPs beyond the model's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.model import ModelConfig, TrainableConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.run import RunConfig, RunSection
from megatron_share4v.config.training import TrainConfig
from megatron_share4v.data.sampling.sampler import GlobalBatch
from megatron_share4v.model.flops import WorkloadCounts, model_flops
from megatron_share4v.planner.gpus import known_gpu
from megatron_share4v.train.step_flops import StepFlops, step_flops

LLM_7B = 6_738_415_616


def flops(model: ModelConfig, *, length: int, images: int, trained: int) -> float:
    return model_flops(model, WorkloadCounts(positions=length, squares=length**2, images=images, head_rows=trained))


def test_language_model_matches_six_n_d() -> None:
    """Compare text-only FLOPs with 6 x (parameters without embedding) per token plus causal attention."""
    model = ModelConfig(trainable=TrainableConfig(language=True))
    length, language = 2048, model.language
    matrices = (
        LLM_7B - language.vocab_size * language.hidden_size - (2 * language.num_layers + 1) * language.hidden_size
    )
    attention = 6 * language.num_layers * length * length * language.hidden_size
    assert flops(model, length=length, images=0, trained=length) == pytest.approx(
        6 * matrices * length + attention, rel=1e-9
    )


def test_frozen_tower_has_forward_flops_only() -> None:
    frozen = ModelConfig(trainable=TrainableConfig(vision_from_block=None))
    half = dataclasses.replace(frozen, trainable=TrainableConfig(vision_from_block=12))

    def per_image(model: ModelConfig) -> float:
        return flops(model, length=600, images=1, trained=20) - flops(model, length=600, images=0, trained=20)

    block = 2 * (577 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 577 * 577 * 1024)
    projector_input_gradient = 2 * 576 * 1024 * 4096
    assert per_image(half) - per_image(frozen) == pytest.approx(2 * 11 * block + projector_input_gradient, rel=1e-9)


def test_head_flops_count_labelled_positions_only() -> None:
    few, many = (flops(ModelConfig(), length=800, images=1, trained=count) for count in (200, 800))
    assert many - few == pytest.approx(6 * 600 * 4096 * 32000)


def flops_of_step(
    *,
    lengths: tuple[int, ...],
    longest: int,
    images: tuple[int, ...],
    counts: tuple[int, ...] | None = None,
    overlap: bool = False,
    padded: tuple[int, ...] | None = None,
    **recompute,
) -> StepFlops:
    """Return the FLOPs of a step with micro-batches of two sequences."""
    config = RunConfig(
        run=RunSection(directory="runs/none"),
        data=DataConfig(train="data", tokenizer="tokenizer.model"),
        parallel=ParallelConfig(overlap_grad_reduce=overlap),
        train=TrainConfig(global_batch_size=len(counts or lengths), micro_batch_size=2, **recompute),
    )
    items = GlobalBatch(
        0,
        np.arange(len(lengths)),
        np.array(lengths),
        longest,
        sum(images),
        100,
        None if counts is None else np.array(counts),
        None if padded is None else np.array(padded),
    )
    return step_flops(config, items, trained_tokens=100, images_per_sample=np.array(images))


def test_padding_adds_hardware_flops_only() -> None:
    tight, wide = (
        flops_of_step(lengths=(600, 600, 600, 600), longest=longest, images=(1, 1, 1, 1)) for longest in (600, 1200)
    )
    assert tight.model == wide.model
    language = ModelConfig().language
    layers = language.num_layers * 4 * (6 * 202_375_168 * 600 + 3.5 * 2 * language.hidden_size * (1200**2 - 600**2))
    assert wide.hardware - tight.hardware == pytest.approx(layers, rel=1e-9)
    # Without padding, only the attention scores recomputed by a flash kernel remain.
    assert 1.0 < tight.hardware / tight.model < 1.01


def test_pack_attention_flops_are_per_sample() -> None:
    packed = flops_of_step(lengths=(300, 700, 900, 80), longest=1000, images=(1, 1, 1, 0), counts=(2, 2))
    alone = flops_of_step(lengths=(300, 700, 900, 80), longest=1000, images=(1, 1, 1, 0))
    assert packed.model == alone.model
    language = ModelConfig().language
    squares, positions = 300**2 + 700**2 + 900**2 + 80**2 + 20**2 - 4 * 1000**2, 2000 - 4000
    layers = language.num_layers * (6 * 202_375_168 * positions + 3.5 * 2 * language.hidden_size * squares)
    assert packed.hardware - alone.hardware == pytest.approx(layers, rel=1e-9)


def test_overlapped_grad_reduce_adds_one_blank_image() -> None:
    """Count one blank image per micro-batch without images: the middle one of three, whose samples are packed."""
    shape = dict(lengths=(600,) * 7, longest=1300, images=(1, 1, 0, 0, 0, 1, 0), counts=(1, 1, 2, 1, 1, 1))
    plain, overlapped = (flops_of_step(**shape, overlap=overlap) for overlap in (False, True))
    one, two = (flops_of_step(lengths=(600, 600), longest=600, images=images).hardware for images in ((1, 0), (1, 1)))
    assert overlapped.model == plain.model
    assert overlapped.hardware - plain.hardware == pytest.approx(two - one, rel=1e-6)


def test_peak_flops_of_known_gpus() -> None:
    assert known_gpu("NVIDIA H200").bf16 == 989e12 and known_gpu("NVIDIA A100-SXM4-80GB").bf16 == 312e12
    assert known_gpu("NVIDIA GB200").name == "GB200" and known_gpu("NVIDIA B200").name == "B200"
    assert known_gpu("some other device") is None and known_gpu("NVIDIA H100 PCIe") is None


def test_padding_per_micro_batch_reduces_hardware_flops() -> None:
    alike = flops_of_step(lengths=(10, 20, 30, 40), longest=40, images=(1, 1, 1, 1))
    own = flops_of_step(lengths=(10, 20, 30, 40), longest=40, images=(1, 1, 1, 1), padded=(20, 20, 40, 40))
    as_long = flops_of_step(lengths=(20, 20, 40, 40), longest=40, images=(1, 1, 1, 1), padded=(20, 20, 40, 40))
    assert own.model == alike.model and own.hardware == as_long.hardware < alike.hardware


def test_recomputation_adds_hardware_flops_only() -> None:
    how = {
        "none": {},
        "attention": {"recompute": "selective"},
        "mlp": {"recompute": "selective", "recompute_modules": ("mlp",)},
    }
    how |= {"half": {"recompute": "full", "recompute_layers": 16}, "full": {"recompute": "full"}}
    work = {
        name: flops_of_step(lengths=(600, 600), longest=600, images=(1, 1), **settings)
        for name, settings in how.items()
    }
    assert len({one.model for one in work.values()}) == 1
    more = {name: one.hardware - work["none"].hardware for name, one in work.items()}
    assert 0 == more["none"] < more["attention"] < more["mlp"] < more["full"] and more["half"] == pytest.approx(
        more["full"] / 2
    )
    assert more["mlp"] == pytest.approx(2 * 1200 * 32 * 3 * 4096 * 11008)
