"""Which steps are bad: loss or gradient not finite, or far above the median of the last good steps. Every rank comes to the same verdict."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_share4v.config.run import BadStepConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.observability.records import read_lines
from megatron_share4v.parallel.collectives import broadcast_object
from megatron_share4v.train.step import not_finite


class Judge:
    """Remembers the last good steps."""

    def __init__(self, config: BadStepConfig, *, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)

    def remember(self, metrics: Path, *, to_step: int) -> None:
        """Know the good steps up to `to_step` from a run's metrics.jsonl, and no others: a run that goes on judges as one that never ended. Collective."""
        steps = broadcast_object(_good_steps(metrics, to_step=to_step) if self._mesh.rank == 0 else [])
        for history, values in zip((self._losses, self._norms), zip(*steps) if steps else ((), ())):
            history.clear()
            history.extend(values)

    def __call__(self, loss: float, norm: float) -> str:
        """What is bad about a step; "" when nothing is, and the step is then remembered. Collective where gradients are compared."""
        config = self._config
        reason = not_finite(loss, norm) or self._spike("loss", loss, self._losses, config.loss_factor)
        if config.gradient_factor is not None:
            reason = self._agreed(reason or self._spike("gradient norm", norm, self._norms, config.gradient_factor))
        if not reason:
            self._losses.append(loss)
            self._norms.append(norm)
        return reason

    def _spike(self, name: str, value: float, history: deque[float], factor: float | None) -> str:
        if factor is None or len(history) < max(1, self._config.window // 4):
            return ""
        usual = statistics.median(history)
        return (
            f"{name} {value:.4g} is more than {factor:g} times the median {usual:.4g} of the last {len(history)} good steps"
            if value > factor * usual
            else ""
        )

    def _agreed(self, reason: str) -> str:
        """Norms of several model-parallel groups may differ in their last bit, and so the verdicts; one bad verdict stands for all."""
        verdict = torch.tensor(float(bool(reason)), device=self._mesh.device.torch_device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        return reason or ("gradient norm is at the limit, and above it on another rank" if verdict.item() else "")


def _good_steps(metrics: Path, *, to_step: int) -> list[tuple[float, float]]:
    lines = read_lines(metrics, "loss", "grad_norm", "skipped")
    good = [(line["loss"], line["grad_norm"]) for line in lines if line["step"] <= to_step and not line["skipped"]]
    return [pair for pair in good if all(map(math.isfinite, pair))]
