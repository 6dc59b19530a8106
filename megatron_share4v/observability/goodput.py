"""Wall-clock accounting of a run on rank 0: each second belongs to one account, from the first start to the last step.

compute_s: the step without the exposed communication. exposed_communication_s: reduction of gradients after the last
backward pass and all-gather of weights after the update, including the wait for the slowest rank; communication inside
forward and backward (TP, CP, PP) cannot be separated from compute without a device sync and counts as compute.
data_wait_s: waiting for the loader. checkpoint_s: saving before this step; a save after the last step has no line.
restart_s: from the last line of the previous process (or the start of this one) to the first step. lost_s: steps of a
previous process that are trained again because they were not saved. other_s: validation, previews, logging.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
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


class CommunicationTimer:
    """Measures the time inside `time()` blocks; with CUDA events in the stream, so without host sync."""

    def __init__(self, device: Device) -> None:
        self._cuda = device.kind == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def time(self) -> Iterator[None]:
        """Measure the block; a block that raises is not counted."""
        begin = self._now()
        yield
        self._spans.append((begin, self._now()))

    def read(self) -> float:
        """Return the seconds since the last call. The device must have been synchronised."""
        spans, self._spans = self._spans, []
        return sum(begin.elapsed_time(end) / 1000 if self._cuda else end - begin for begin, end in spans)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class GoodputTracker:
    """Accounts of one process, continued from the lines that earlier processes left in `metrics` (None off rank 0)."""

    def __init__(
        self, metrics: Path | None, *, device: Device, start_step: int, now: Callable[[], float] = time.time
    ) -> None:
        self.communication = CommunicationTimer(device)
        self._now, self._saving, self._lost, self._first = now, 0.0, 0.0, True
        kept, last = _read_accounts(metrics, start_step)
        self._totals: dict[str, float] = {name: sum(line.get(name, 0.0) for line in kept) for name in ACCOUNTS}
        self._previous = min(psutil.Process().create_time(), now())
        if kept and last is not None:
            self._previous, self._lost = kept[-1]["time"], last - kept[-1]["time"]

    @contextlib.contextmanager
    def time_save(self) -> Iterator[None]:
        """Measure a save; its time goes on the next line."""
        begun = self._now()
        yield
        self._saving += max(0.0, self._now() - begun)  # the wall clock may be set back

    def account_step(self, *, step_s: float, data_wait_s: float) -> dict[str, float]:
        """Return seconds by account since the previous call, with `time` (Unix time) and `goodput`, compute over total.

        Call it after the step, with the device synchronised. `step_s` excludes the wait for data.
        """
        now = self._now()
        exposed = min(self.communication.read(), step_s)
        accounts = {
            "compute_s": step_s - exposed,
            "exposed_communication_s": exposed,
            "data_wait_s": data_wait_s,
            "checkpoint_s": self._saving,
            "restart_s": 0.0,
            "lost_s": self._lost,
            "other_s": 0.0,
        }
        rest = max(0.0, now - self._previous - sum(accounts.values()))
        accounts["restart_s" if self._first else "other_s"] = rest
        self._previous, self._saving, self._lost, self._first = now, 0.0, 0.0, False
        for name, seconds in accounts.items():
            self._totals[name] += seconds
        return {"time": now, "goodput": self._totals["compute_s"] / max(sum(self._totals.values()), 1e-9)} | accounts


def _read_accounts(metrics: Path | None, start_step: int) -> tuple[list[dict], float | None]:
    """Return (lines up to `start_step` that have accounts, time of the last line of all)."""
    timed = read_lines(metrics, "time", *ACCOUNTS) if metrics is not None else []
    return [line for line in timed if line["step"] <= start_step], timed[-1]["time"] if timed else None


def draw_goodput(directory: Path) -> None:
    """Write goodput.png from metrics.jsonl of a run directory; write nothing when no line has accounts."""
    lines, _ = _read_accounts(directory / "metrics.jsonl", 1 << 62)
    if lines:
        save_png(goodput_figure(lines), directory / PICTURE)


def goodput_figure(lines: list[dict]) -> Figure:
    """Share of each account over the run's wall-clock time, with the sums in the legend."""
    seconds = [sum(line[name] for name in ACCOUNTS) for line in lines]
    total: float = sum(seconds)
    sums: dict[str, float] = {name: sum(line[name] for line in lines) for name in ACCOUNTS}
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
