"""Freezing of parameters by component and block number, and a table of the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from megatron_share4v.config.model import TrainableConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.model.share4v import Share4V

Component = Literal["vision", "projector", "language"]
COMPONENTS: tuple[Component, ...] = ("vision", "projector", "language")


def component_of(name: str) -> Component:
    """Return the component of a parameter name (with or without wrapper prefixes)."""
    for part in name.split("."):
        if part in COMPONENTS:
            return part
    raise AssertionError(f"parameter {name} belongs to no component")


def apply_trainable(chunk: Share4V, trainable: TrainableConfig) -> None:
    """Set requires_grad of every parameter.

    Run before gradient buffers are made, so that frozen parameters get none.
    """
    for name, parameter in chunk.named_parameters():
        component = component_of(name)
        parameter.component = component
        parameter.requires_grad_(_trains(name, component, trainable))


def _trains(name: str, component: Component, trainable: TrainableConfig) -> bool:
    if component != "vision":
        return getattr(trainable, component)
    start = trainable.vision_from_block
    if start is None or start == -1:
        return start is not None
    parts = name.split(".")
    return "layers" in parts and int(parts[parts.index("layers") + 1]) >= start


def parameter_counts(chunks: Iterable[nn.Module], *, mesh: Mesh) -> dict[tuple[Component, bool], int]:
    """Count the elements of the whole model by (component, trained).

    Collective; replicated weights are counted once, and so is a tied embedding of which the last stage has a copy.
    """
    counts = {(component, trains): 0 for component in COMPONENTS for trains in (True, False)}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if getattr(parameter, "shared", False):
                continue
            split = getattr(parameter, "tensor_model_parallel", False)
            if mesh.is_first_replica and (split or mesh.coordinates.tensor == 0):
                counts[component_of(name), parameter.requires_grad] += parameter.numel()
    totals = torch.tensor(list(counts.values()), device=mesh.device.torch_device)
    dist.all_reduce(totals)
    return dict(zip(counts, totals.tolist()))


def format_parameter_table(counts: dict[tuple[Component, bool], int]) -> Iterator[str]:
    """Yield the lines of a table of trained and frozen elements."""
    yield f"{'component':<12}{'trained':>18}{'frozen':>18}"
    for component in COMPONENTS:
        yield f"{component:<12}{counts[component, True]:>18,}{counts[component, False]:>18,}"
