"""Picture of a prediction: the pipeline schedule of one step, and the memory of each pipeline rank."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from megatron_share4v.observability.charts import PALETTE, new_figure, style_axes
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.report import CLASSES, PREDICTED

if TYPE_CHECKING:
    from megatron_share4v.observability.charts import Axes, Figure

WIDTH = 1000
MAX_ROWS = 16
"""Pipeline ranks drawn; of more, the first and the last ones."""
FORWARD = ("#9ebee4", "#6c98ce", "#3f69aa", "#244478")
BACKWARD = ("#f6cba5", "#eeaa74", "#e28743", "#b46022")
IDLE = "#f3f4f6"


def draw_prediction(prediction: Prediction, *, title: str) -> Figure:
    """Schedule above, memory below, one row per pipeline rank."""
    ranks = _shown_ranks(prediction.case.layout.pipeline)
    row = max(10, min(24, 240 // len(ranks)))
    figure = new_figure(WIDTH, 330 + 2 * row * len(ranks))
    step = f"{PREDICTED}: step {prediction.step_s:.3f} s, {prediction.utilisation}, bubble {prediction.bubble:.1%}"
    figure.suptitle(f"{title}\n{step}", fontsize=10)
    schedule, memory = figure.subplots(2, 1)
    _draw_schedule(schedule, prediction, ranks)
    _draw_memory(memory, prediction, ranks)
    return figure


def _shown_ranks(ranks: int) -> list[int]:
    half = MAX_ROWS // 2
    return list(range(ranks)) if ranks <= MAX_ROWS else [*range(half), *range(ranks - half, ranks)]


def _draw_schedule(axes: Axes, prediction: Prediction, ranks: list[int]) -> None:
    virtual = prediction.case.layout.virtual
    for row, rank in enumerate(ranks):
        spans = defaultdict(list)
        for timed in prediction.timeline[rank]:
            shades = FORWARD if timed.task.kind == "forward" else BACKWARD
            colour = shades[_shade(timed.task.chunk, virtual)]
            spans[colour].append((timed.start, timed.end - timed.start))
        for colour, of_colour in spans.items():
            axes.broken_barh(of_colour, (row - 0.45, 0.9), facecolors=colour, edgecolors=IDLE, linewidth=0.3)
        update = [(prediction.pipeline_s, prediction.after_s)]
        axes.broken_barh(update, (row - 0.45, 0.9), facecolors=PALETTE[2])
    axes.set_facecolor(IDLE)
    axes.set_xlim(0, prediction.pipeline_s + prediction.after_s)
    axes.set_xlabel("time in the step, s", fontsize=9)
    _label_ranks(axes, ranks)
    colours = {"forward": FORWARD[2], "backward": BACKWARD[2], "gradients and update": PALETTE[2], "idle": IDLE}
    for label, colour in colours.items():
        axes.bar(0, 0, color=colour, label=label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, frameon=False)


def _shade(chunk: int, virtual: int) -> int:
    """Index of a colour: darker for later chunks, the legend's colour for a single one."""
    return 2 if virtual == 1 else round(chunk * 3 / (virtual - 1))


def _draw_memory(axes: Axes, prediction: Prediction, ranks: list[int]) -> None:
    gpu = prediction.case.gpu
    rows, left = range(len(ranks)), [0.0] * len(ranks)
    for number, name in enumerate(CLASSES):
        sizes = [getattr(prediction.memory[rank], name) / 1e9 for rank in ranks]
        axes.barh(rows, sizes, left=left, height=0.9, color=PALETTE[number], label=name)
        left = [before + size for before, size in zip(left, sizes)]
    for row, total in zip(rows, left):
        axes.text(total, row, f" {total:.1f}", va="center", fontsize=8)
    axes.axvline(gpu.memory / 1e9, color=PALETTE[3], label=f"{gpu.name}, {gpu.memory / 1e9:.0f} GB")
    axes.set_xlim(0, 1.05 * max(prediction.needed, gpu.memory) / 1e9)
    axes.set_xlabel("memory, GB", fontsize=9)
    style_axes(axes, grid="x")
    _label_ranks(axes, ranks)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=7, fontsize=8, frameon=False)


def _label_ranks(axes: Axes, ranks: list[int]) -> None:
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks], fontsize=8)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
