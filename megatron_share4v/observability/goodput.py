"""Goodput accounting: assigns every second of a run's wall-clock time, from first start to last step on rank 0, to one account.

compute_s: the step, less what is exposed. exposed_communication_s: reducing gradients after the last backward pass, and gathering weights after the
update, with the wait for the slowest rank; messages inside forward and backward (tensor, context, pipeline) cannot be told from compute without
stopping the device, and count as compute. data_wait_s: for the loader. checkpoint_s: saving, before this step; after the last step there is no line
to book it on. restart_s: from the last line of the process before (or this process's begin) to the first step. lost_s: steps of an earlier process
that are made once more, since it was not saved after them. other_s: validation, previews, logging.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from megatron_share4v.observability.charts import PALETTE, new_figure, save_png, style_axes
from megatron_share4v.observability.records import read_lines
from megatron_share4v.parallel.device import Device

if TYPE_CHECKING:
    from megatron_share4v.observability.charts import Figure

ACCOUNTS = ("compute_s", "exposed_communication_s", "data_wait_s", "checkpoint_s", "restart_s", "lost_s", "other_s")
COLOURS = dict(zip(ACCOUNTS, (PALETTE[0], PALETTE[1], PALETTE[4], PALETTE[2], PALETTE[3], PALETTE[6], PALETTE[7])))
PICTURE, BINS = "goodput.png", 150


class Clock:
    """Seconds spent inside watched functions. On CUDA they are measured by events in the stream, so that the host waits for nothing."""

    def __init__(self, device: Device) -> None:
        self._cuda = device.kind == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def watched(self, function: Callable) -> Callable:
        """The same function, timed."""

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            begin = self._now()
            result = function(*arguments, **named)
            self._spans.append((begin, self._now()))
            return result

        return call

    def read(self) -> float:
        """Since the last reading. The device must have been synchronised."""
        spans, self._spans = self._spans, []
        return sum(begin.elapsed_time(end) / 1000 if self._cuda else end - begin for begin, end in spans)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Ledger:
    """The accounts of one process, continued from the lines that earlier ones have left in `metrics`. Every rank has one; rank 0's is written."""

    def __init__(
        self, metrics: Path | None, *, device: Device, start_step: int, now: Callable[[], float] = time.time
    ) -> None:
        self._now, self._clock, self._saving, self._lost, self._first = now, Clock(device), 0.0, 0.0, True
        kept, last = _times(metrics, start_step)
        self._totals = {name: sum(line.get(name, 0.0) for line in kept) for name in ACCOUNTS}
        self._previous = min(psutil.Process().create_time(), now())
        if kept and last is not None:
            self._previous, self._lost = kept[-1]["time"], last - kept[-1]["time"]

    def watch(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Time what these data-parallel wrapped chunks communicate outside forward and backward."""
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = self._clock.watched(chunk.config.finalize_model_grads_func)
            chunk.start_param_sync = self._clock.watched(chunk.start_param_sync)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what saves a checkpoint; it is booked on the next line."""
        begun = self._now()
        yield
        self._saving += max(0.0, self._now() - begun)  # the clock may be set back

    def line(self, *, step_s: float, data_wait_s: float) -> dict[str, float]:
        """What happened since the line before, in seconds by account; `time` (seconds since 1970) and `goodput`, the share of compute in all so far.

        Call it when the step is made and the device is synchronised; `step_s` without the wait for data.
        """
        now = self._now()
        exposed = min(self._clock.read(), step_s)
        booked = {
            "compute_s": step_s - exposed,
            "exposed_communication_s": exposed,
            "data_wait_s": data_wait_s,
            "checkpoint_s": self._saving,
            "restart_s": 0.0,
            "lost_s": self._lost,
            "other_s": 0.0,
        }
        booked["restart_s" if self._first else "other_s"] = max(0.0, now - self._previous - sum(booked.values()))
        self._previous, self._saving, self._lost, self._first = now, 0.0, 0.0, False
        for name, seconds in booked.items():
            self._totals[name] += seconds
        return {"time": now, "goodput": self._totals["compute_s"] / max(sum(self._totals.values()), 1e-9)} | booked


def _times(metrics: Path | None, start_step: int) -> tuple[list[dict], float | None]:
    """(lines up to `start_step` that have accounts, time of the last line of all)."""
    timed = read_lines(metrics, "time", *ACCOUNTS) if metrics is not None else []
    return [line for line in timed if line["step"] <= start_step], timed[-1]["time"] if timed else None


def draw_goodput(directory: Path) -> None:
    """Write goodput.png from metrics.jsonl of a run directory; write nothing when no line has accounts."""
    lines, _ = _times(directory / "metrics.jsonl", 1 << 62)
    if lines:
        save_png(goodput_figure(lines), directory / PICTURE)


def goodput_figure(lines: list[dict]) -> Figure:
    """Share of each account over the run's wall-clock time, with the sums in the legend."""
    seconds = [sum(line[name] for name in ACCOUNTS) for line in lines]
    total = sum(seconds)
    sums = {name: sum(line[name] for line in lines) for name in ACCOUNTS}
    shares = {name: amount / max(total, 1e-9) for name, amount in sums.items()}
    unit, divisor = ("s", 1) if total < 120 else ("min", 60) if total < 7200 else ("h", 3600)
    bins = _binned(lines, seconds, total / BINS, BINS)
    heights = [[100 * amounts[name] / max(sum(amounts.values()), 1e-12) for amounts in bins] for name in ACCOUNTS]
    labels = [f"{_label(name)}  {_duration(sums[name])}  {shares[name]:.1%}" for name in ACCOUNTS]
    edges = [number * total / BINS / divisor for number in range(BINS + 1)]
    figure = new_figure(1000, 380)
    axes = figure.subplots()
    colours = [COLOURS[name] for name in ACCOUNTS]
    axes.stackplot(edges, [[*row, row[-1]] for row in heights], labels=labels, colors=colours, step="post", linewidth=0)
    axes.set_title(f"goodput {shares['compute_s']:.1%} of {_duration(total)}, {len(lines)} steps", fontsize=11)
    axes.set_xlim(0, max(edges[-1], 1e-9))
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"wall-clock time, {unit}")
    axes.set_ylabel("share of time, %")
    style_axes(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _label(account: str) -> str:
    """Name of an account in the legend: the first start of a run counts as `restart_s` too, so it reads `start`."""
    return "start" if account == "restart_s" else account.removesuffix("_s").replace("_", " ")


def _binned(lines: list[dict], seconds: list[float], size: float, bins: int) -> list[dict[str, float]]:
    """Each line's accounts, spread evenly over the bins of `size` seconds that it lasted."""
    result = [dict.fromkeys(ACCOUNTS, 0.0) for _ in range(bins)]
    begin = 0.0
    for line, lasted in zip(lines, seconds):
        first, last = int(begin / size) if size else 0, int((begin + lasted) / size) if size else 0
        for number in range(min(first, bins - 1), min(last, bins - 1) + 1):
            inside = min(begin + lasted, (number + 1) * size) - max(begin, number * size)
            for name in ACCOUNTS:
                result[number][name] += line[name] * max(inside, 0.0) / lasted if lasted else 0.0
        begin += lasted
    return result


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
