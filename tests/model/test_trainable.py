"""Freezing by component and block number, memory of the tower's frozen prefix, and the printed table."""

from __future__ import annotations

import pytest
import torch
from tiny import micro_batches, tiny_model

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import initialize_weights
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.model.trainable import component_of, format_parameter_table, parameter_counts


def _build(mesh: Mesh, **trainable) -> Share4V:
    model = tiny_model(**trainable)
    (chunk,) = build_chunks(model, mesh=mesh, parallel=ParallelConfig(), dtype=torch.float32)
    initialize_weights([chunk], seed=0, model=model)
    return chunk


def _trained(chunk: Share4V) -> set[str]:
    return {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}


def test_components_train_as_configured(mesh: Mesh) -> None:
    names = {name for name, _ in _build(mesh).named_parameters()}
    of = {
        component: {name for name in names if component_of(name) == component}
        for component in ("vision", "projector", "language")
    }
    assert set.union(*of.values()) == names and all(of.values())
    assert _trained(_build(mesh, projector=True, language=False)) == of["projector"]
    assert _trained(_build(mesh, projector=False, language=True)) == of["language"]
    assert _trained(_build(mesh, vision_from_block=-1)) == names
    assert _trained(_build(mesh, vision_from_block=1)) == names - {
        name for name in of["vision"] if ".layers.1." not in name
    }
    blocks = {name for name in of["vision"] if ".layers." in name}
    assert _trained(_build(mesh, vision_from_block=0)) == names - (of["vision"] - blocks)


@pytest.mark.parametrize(
    "trainable", [{"vision_from_block": 1}, {"vision_from_block": 0}, {"vision_from_block": -1}, {"language": False}]
)
def test_only_trained_parameters_get_gradients(mesh: Mesh, trainable: dict) -> None:
    chunk = _build(mesh, **trainable)
    chunk(micro_batches(0)[0]).backward()
    received = {
        name
        for name, parameter in chunk.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    assert received == _trained(chunk)


def test_frozen_prefix_saves_no_activations(mesh: Mesh) -> None:
    pixels = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    kept: list[torch.Tensor] = []

    def elements_kept(chunk: Share4V) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            chunk.vision(pixels)
        return sum(tensor.numel() for tensor in kept)

    assert elements_kept(_build(mesh, language=True)) == 0
    from_block_1, from_block_0, whole = (elements_kept(_build(mesh, vision_from_block=start)) for start in (1, 0, -1))
    assert 0 < from_block_1 < from_block_0 < whole


def test_freezing_changes_no_value(mesh: Mesh) -> None:
    batch = micro_batches(0)[0]
    assert (
        _build(mesh, vision_from_block=-1)(batch)
        == _build(mesh, vision_from_block=1)(batch)
        == _build(mesh, language=False)(batch)
    )


def test_counts_and_table_agree_with_the_model(mesh: Mesh) -> None:
    chunk = _build(mesh, vision_from_block=1)
    counts = parameter_counts([chunk], mesh=mesh)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in chunk.parameters())
    assert counts["projector", False] == 0 and counts["vision", True] == sum(
        p.numel() for p in chunk.vision.layers[1].parameters()
    )
    lines = list(format_parameter_table(counts))
    assert lines[0].split() == ["component", "trained", "frozen"]
    assert lines[1].split() == ["vision", f"{counts['vision', True]:,}", f"{counts['vision', False]:,}"]


def test_parameter_without_component_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError, match="something.weight"):
        component_of("something.weight")
