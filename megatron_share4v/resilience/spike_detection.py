"""Detection of bad steps: loss or gradient norm not finite, or far above the median of the last good steps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_share4v.config.training import BadStepConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.observability.records import read_lines
from megatron_share4v.parallel.collectives import broadcast_object


def describe_non_finite(loss: float, grad_norm: float) -> str:
    """Return which value is not finite, or "". Both values cover the whole step, so all ranks return the same."""
    values = (("loss", loss), ("gradient norm", grad_norm))
    return " and ".join(f"{name} is {value}" for name, value in values if not math.isfinite(value))


class SpikeDetector:
    """Detector of steps whose loss or gradient norm is far above the median of the last good steps."""

    def __init__(self, config: BadStepConfig, *, mesh: Mesh | None) -> None:
        """mesh: needed by `restore`, and by `__call__` where gradient norms are compared."""
        self._config, self._mesh = config, mesh
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def restore(self, metrics: Path, *, to_step: int) -> None:
        """Restore the history from the good steps of metrics.jsonl up to `to_step`, after a restart. Collective."""
        assert self._mesh is not None
        steps = broadcast_object(_read_good_steps(metrics, to_step=to_step) if self._mesh.rank == 0 else [])
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(loss for loss, _ in steps)
        self._norms.extend(norm for _, norm in steps)

    def __call__(self, loss: float, grad_norm: float) -> str:
        """Return why a step is bad, or "" and add it to the history. Collective where gradient norms are compared."""
        config = self._config
        reason = describe_non_finite(loss, grad_norm)
        reason = reason or self._describe_spike("loss", loss, self._losses, config.loss_factor)
        if config.gradient_factor is not None:
            reason = reason or self._describe_spike("gradient norm", grad_norm, self._norms, config.gradient_factor)
            reason = self._agree_across_ranks(reason)
        if not reason:
            self._losses.append(loss)
            self._norms.append(grad_norm)
        return reason

    def _describe_spike(self, name: str, value: float, history: deque[float], factor: float | None) -> str:
        if factor is None or len(history) < max(1, self._config.window // 4):
            return ""
        median = statistics.median(history)
        if value <= factor * median:
            return ""
        limit = f"{factor:g} times the median {median:.4g} of the last {len(history)} good steps"
        return f"{name} {value:.4g} is more than {limit}"

    def _agree_across_ranks(self, reason: str) -> str:
        """Agree across ranks: a step is bad when any rank finds it bad.

        Gradient norms of several model-parallel groups may differ in their last bit.
        """
        assert self._mesh is not None
        is_bad = torch.tensor(float(bool(reason)), device=self._mesh.device.torch_device)
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        return reason or ("gradient norm is at the limit, and above it on another rank" if is_bad.item() else "")


def _read_good_steps(metrics: Path, *, to_step: int) -> list[tuple[float, float]]:
    lines = read_lines(metrics, "loss", "grad_norm", "skipped")
    good = [(line["loss"], line["grad_norm"]) for line in lines if line["step"] <= to_step and not line["skipped"]]
    return [pair for pair in good if all(map(math.isfinite, pair))]
