"""Charts as PNG files, drawn with matplotlib's Agg backend; no display and no pyplot state.

matplotlib is imported when the first figure is made, so that commands without charts do not pay for its import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

PALETTE = ("#3f69aa", "#e28743", "#689f60", "#ba5560", "#8c70b0", "#967662", "#d8a0c8", "#78808c")
DPI = 100


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of width x height pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", pil_kwargs={"optimize": True})


def style_axes(axes: Axes, *, grid: str = "y") -> None:
    """Light grid lines along `grid`, small tick labels, no upper and right border."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e2e5ea", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


@dataclass(frozen=True)
class Series:
    """One bar per group; None where the series has no value. Hatched bars are not comparable with the others."""

    name: str
    values: Sequence[float | None]
    hatched: bool = False


def bar_chart(title: str, groups: Sequence[str], series: Sequence[Series]) -> Figure:
    """Horizontal bars, one panel with its own scale for each group that has a value."""
    shown = [column for column in range(len(groups)) if any(each.values[column] is not None for each in series)]
    figure = new_figure(760, 90 + 20 * len(series) + len(shown) * (34 + 13 * len(series)))
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(max(len(shown), 1), 1, squeeze=False)[:, 0]
    for axes, column in zip(panels, shown):
        style_axes(axes, grid="x")
        axes.set_ylabel(groups[column], rotation=0, ha="right", va="center", fontsize=9)
        for number, each in enumerate(series):
            value = each.values[column]
            if value is None:
                continue
            colour = PALETTE[number % len(PALETTE)]
            look = {"facecolor": "white", "edgecolor": colour, "hatch": "////"} if each.hatched else {"color": colour}
            bar = axes.barh(number, value, height=0.8, **look)
            axes.bar_label(bar, fmt="%.1f", fontsize=7, padding=2)
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.margins(x=0.1)
    _bar_legend(figure, series)
    return figure


def _bar_legend(figure: Figure, series: Sequence[Series]) -> None:
    from matplotlib.patches import Patch

    patches = []
    for number, each in enumerate(series):
        colour = PALETTE[number % len(PALETTE)]
        look = {"facecolor": "white", "hatch": "////"} if each.hatched else {"facecolor": colour}
        patches.append(Patch(edgecolor=colour, label=each.name, **look))
    figure.legend(handles=patches, loc="outside lower center", ncols=1, fontsize=8, frameon=False)


def histogram(values: Sequence[float] | np.ndarray, *, bins: int, title: str, x_label: str, y_label: str) -> Figure:
    """Counts of `values` in `bins` intervals of equal width."""
    figure = new_figure(900, 420)
    axes = figure.subplots()
    axes.hist(values, bins=bins, color=PALETTE[0], rwidth=0.9)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    style_axes(axes)
    return figure
