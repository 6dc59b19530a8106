"""Backend selection of a run: fused ops (ops/backend.py decides on each rank) and the attention kernel.

All ranks must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_share4v.config.run import Attention, Ops, RunConfig
from megatron_share4v.errors import OpsError
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.transformer_engine import REMEDY, te_unavailable_reason
from megatron_share4v.ops.backend import LibrarySources, OpsBackend, choose_ops_backend
from megatron_share4v.ops.fp8_linear import require_fp8
from megatron_share4v.parallel.collectives import gather_objects

BLACKWELL = (10, 0)


def select_ops_backend(requested: Ops, *, mesh: Mesh, available: LibrarySources | None = None) -> OpsBackend:
    """Select the ops implementation. Collective; one rank of each machine builds the library.

    Raises OpsError on every rank, with one message, when `native` is requested and a rank cannot have it, or when ranks
    would differ.
    """
    remedy = (
        f"ops: {requested} does not lead to the same on every rank; give all machines the same compilers, "
        "or set ops: reference."
    )
    return _require_same_choice(
        lambda: choose_ops_backend(requested, device=mesh.device.kind, available=available), mesh=mesh, remedy=remedy
    )


Backend = TypeVar("Backend", OpsBackend, "AttentionBackend")


@dataclass(frozen=True)
class AttentionBackend:
    """The selected attention kernel (attention.py) and the reason. Record `line` with the run."""

    implementation: str
    reason: str

    @property
    def line(self) -> str:
        """Return one line for the log and the run directory."""
        return f"attention: {self.implementation} ({self.reason})"


def select_attention_backend(requested: Attention, *, mesh: Mesh, packed: bool, dtype: torch.dtype) -> AttentionBackend:
    """Select the attention kernel. Collective.

    Raises OpsError on every rank, with one message, when the requested kernel is unavailable, or unavailable for packed
    samples.
    """
    remedy = (
        f"attention: {requested} does not lead to the same on every rank; give all machines the same GPUs and "
        "packages, or set attention: sdpa."
    )
    return _require_same_choice(
        lambda: choose_attention_backend(requested, device=mesh.device.torch_device, packed=packed, dtype=dtype),
        mesh=mesh,
        remedy=remedy,
    )


def choose_attention_backend(
    requested: Attention, *, device: torch.device, packed: bool, dtype: torch.dtype
) -> AttentionBackend:
    """Choose the attention kernel of this process. Raises OpsError."""
    if requested == "auto":
        if not packed:
            return AttentionBackend("sdpa", "samples are not packed")
        unsupported = _unsupported_reason("varlen", device=device, packed=packed, dtype=dtype)
        return (
            AttentionBackend("sdpa", f"sample by sample, since varlen: {unsupported}")
            if unsupported
            else AttentionBackend("varlen", "samples are packed")
        )
    unsupported = _unsupported_reason(requested, device=device, packed=packed, dtype=dtype)
    if unsupported:
        raise OpsError(f"attention: {requested} was requested on {device.type}: {unsupported}")
    return AttentionBackend(requested, "as configured")


def _unsupported_reason(kernel: str, *, device: torch.device, packed: bool, dtype: torch.dtype) -> str | None:
    if kernel == "varlen":
        if device.type != "cuda":
            return "torch has this kernel for NVIDIA GPUs only; use sdpa or auto"
        if dtype is not torch.bfloat16:
            return "torch has this kernel for bf16 only; use sdpa, auto or precision.dtype bf16"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 (A100) or later; use sdpa or auto"
    if kernel == "te":
        missing = te_unavailable_reason()
        if missing:
            return f"{missing}; {REMEDY}"
        if packed and dtype is not torch.bfloat16:
            return (
                "Transformer Engine's fused kernels, the only ones that keep packed samples apart without the cost of "
                "a mask, are for bf16; use precision.dtype bf16, sdpa, or no data.pack_length"
            )
    return None


def check_precision(config: RunConfig, *, mesh: Mesh) -> None:
    """Raise OpsError when the run requests FP8 or Transformer Engine and this machine does not have it."""
    if config.transformer_engine != "none":
        missing = te_unavailable_reason()
        if missing:
            raise OpsError(
                f"transformer_engine: {config.transformer_engine} was requested: {missing}; {REMEDY}, "
                "or set transformer_engine: none"
            )
    if config.precision.fp8 != "none":
        require_fp8(mesh.device.torch_device)
    if config.precision.fp8 == "mxfp8" and torch.cuda.get_device_capability(mesh.device.torch_device) < BLACKWELL:
        raise OpsError(
            f"precision.fp8: mxfp8 needs compute capability {BLACKWELL} (Blackwell); "
            "use tensorwise, delayed or blockwise"
        )


def _require_same_choice(choose: Callable[[], Backend], *, mesh: Mesh, remedy: str) -> Backend:
    try:
        choice = choose()
        outcome = choice.line
    except OpsError as error:
        choice, outcome = None, str(error)
    ranks = gather_objects((choice.implementation if choice else None, outcome))
    if len({implementation for implementation, _ in ranks}) == 1 and choice:
        return choice
    raise OpsError(_describe_difference(remedy, ranks))


def _describe_difference(remedy: str, ranks: Sequence[tuple[str | None, str]]) -> str:
    """Format each rank's outcome, ranks with the same outcome on one line."""
    members: dict[str, list[int]] = {}
    for rank, (_, outcome) in enumerate(ranks):
        members.setdefault(outcome, []).append(rank)
    if len(members) == 1:
        return next(iter(members))
    lines = "".join(f"\nranks {', '.join(map(str, numbers))}: {outcome}" for outcome, numbers in members.items())
    return remedy + lines
