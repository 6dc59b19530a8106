"""Initial weights: the same at every layout, of the intended scale.

Every shard knows its offset in the global tensor.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from tiny import tiny_model

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import fill_parameters, initial_value, initialize_weights, iter_shards
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.layout import Layout

MODEL = tiny_model(vision_from_block=-1)


def slices(parallel: ParallelConfig) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor, bool]]:
    """Return every shard of this rank after `initialize_weights`."""
    layout = Layout.for_world(parallel, world_size=dist.get_world_size())
    with open_mesh(layout, device=Device("cpu")) as mesh:
        chunks = build_chunks(MODEL, mesh=mesh, parallel=parallel, dtype=torch.float32)
        initialize_weights(chunks, seed=7, model=MODEL)
        return [
            (shard.key, shard.global_shape, shard.offset, shard.data.clone(), shard.replica)
            for shard in iter_shards(chunks)
        ]


def _assemble(ranks: list[list]) -> dict[str, torch.Tensor]:
    """Assemble global tensors from the written shards; each element must be written exactly once."""
    tensors, written = {}, {}
    for key, shape, offset, data, replica in (piece for rank in ranks for piece in rank):
        place = tuple(slice(start, start + size) for start, size in zip(offset, data.shape))
        whole = tensors.setdefault(key, torch.full(shape, math.nan))
        if not replica:
            whole[place] = data
            written.setdefault(key, torch.zeros(shape, dtype=torch.int))[place] += 1
    for key, count in written.items():
        assert (count == 1).all(), key
    assert set(written) == set(tensors)
    return tensors


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return _assemble(run_world(1, slices, ParallelConfig()))


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2, virtual=2), ParallelConfig()]
)
def test_every_layout_starts_from_the_same_weights(parallel: ParallelConfig, alone: dict[str, torch.Tensor]) -> None:
    together = _assemble(run_world(2, slices, parallel))
    assert set(together) == set(alone)
    assert all(torch.equal(together[key], alone[key]) for key in alone)


def wrongly_tagged(parallel: ParallelConfig) -> list[str]:
    """Return parameters of this rank whose tensor-parallel attribute, which the gradient norm uses, is wrong."""
    layout = Layout.for_world(parallel, world_size=dist.get_world_size())
    with open_mesh(layout, device=Device("cpu")) as mesh:
        chunks = build_chunks(MODEL, mesh=mesh, parallel=parallel, dtype=torch.float32)
        held, whole = Counter(), {}
        for shard in iter_shards(chunks):
            # Gate and up are two shards of one parameter.
            held[shard.data.untyped_storage().data_ptr()] += shard.data.numel()
            whole[shard.data.untyped_storage().data_ptr()] = math.prod(shard.global_shape)
        split = {place for place in held if held[place] < whole[place]}
        parameters = [pair for chunk in chunks for pair in chunk.named_parameters()]
        return [
            name
            for name, parameter in parameters
            if getattr(parameter, "tensor_model_parallel", False) != (parameter.untyped_storage().data_ptr() in split)
        ]


def test_only_sharded_weights_have_tensor_parallel_attributes() -> None:
    assert run_world(2, wrongly_tagged, ParallelConfig(tensor=2)) == [[], []]


def test_values_have_the_intended_size(alone: dict[str, torch.Tensor]) -> None:
    layers, std = MODEL.language.num_layers, MODEL.init_std
    assert (alone["language.decoder.layers.3.input_layernorm.weight"] == 1).all()
    assert (alone["vision.layers.0.self_attention.linear_qkv.bias"] == 0).all()
    assert alone["language.decoder.layers.3.mlp.linear_fc1.weight"].std().item() == pytest.approx(std, rel=0.1)
    assert alone["language.decoder.layers.3.mlp.linear_fc2.weight"].std().item() == pytest.approx(
        std / math.sqrt(2 * layers), rel=0.1
    )
    assert not torch.equal(
        alone["language.decoder.layers.3.mlp.linear_fc2.weight"],
        alone["language.decoder.layers.4.mlp.linear_fc2.weight"],
    )
    for key in ("language.embedding.weight", "language.head.weight"):
        vocabulary = MODEL.language.vocab_size
        assert (alone[key][vocabulary:] == 0).all() and alone[key][:vocabulary].abs().min() > 0


def test_values_depend_only_on_seed_and_name() -> None:
    def value(seed: int, key: str) -> torch.Tensor:
        return initial_value(key, (4, 4), seed=seed, model=MODEL)

    assert torch.equal(value(1, "a.weight"), value(1, "a.weight"))
    assert not torch.equal(value(1, "a.weight"), value(2, "a.weight"))
    assert not torch.equal(value(1, "a.weight"), value(1, "b.weight"))


def test_fill_parameters_rejects_other_shapes(mesh: Mesh) -> None:
    chunks = build_chunks(MODEL, mesh=mesh, parallel=ParallelConfig(), dtype=torch.float32)
    with pytest.raises(AssertionError, match="class_embedding"):
        fill_parameters(chunks, lambda key, shape: torch.zeros(1, 2, 3))
