"""A chart of numbers beside each other, as a picture: a block per group, a bar per series, the number at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_COLOURS = ("#4c72b0", "#8fa8d0", "#55a868", "#a3cfae", "#c44e52", "#dd8452", "#8172b3", "#937860")
_BAR, _GAP, _LEFT, _WIDTH, _RIGHT, _TOP = 15, 10, 110, 460, 80, 30


@dataclass(frozen=True)
class Series:
    """values: one per group, None where there is none. striped: not to be compared with the others without a thought."""

    name: str
    values: Sequence[float | None]
    striped: bool = False


def bar_chart(title: str, groups: Sequence[str], series: Sequence[Series]) -> Image.Image:
    """Bars of one group are drawn on one scale, from 0 to its largest value; groups without a value are left out."""
    shown = [place for place in range(len(groups)) if any(each.values[place] is not None for each in series)]
    bars = sum(each.values[place] is not None for each in series for place in shown)
    height = _TOP + (bars + len(series)) * _BAR + (len(shown) + 2) * _GAP
    canvas = Image.new("RGB", (_LEFT + _WIDTH + _RIGHT, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    draw.text((_GAP, _GAP), title, fill="black", font=font)
    top = _TOP
    for place in shown:
        draw.text((_GAP, top), groups[place], fill="black", font=font)
        largest = max(abs(each.values[place] or 0) for each in series) or 1
        for number, each in enumerate(series):
            if (value := each.values[place]) is not None:
                right = _LEFT + max(round(_WIDTH * value / largest), 1)
                _bar(draw, (_LEFT, top, right, top + _BAR - 3), number, striped=each.striped)
                draw.text((right + 4, top - 1), f"{value:.1f}", fill="black", font=font)
                top += _BAR
        top += _GAP
    for number, each in enumerate(series):
        _bar(draw, (_LEFT, top, _LEFT + 30, top + _BAR - 3), number, striped=each.striped)
        draw.text((_LEFT + 40, top - 1), each.name, fill="black", font=font)
        top += _BAR
    return canvas


def _bar(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], number: int, *, striped: bool) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    if not striped:
        draw.rectangle(box, fill=colour)
        return
    draw.rectangle(box, outline=colour)
    for left in range(box[0], box[2], 6):
        draw.rectangle((left, box[1], min(left + 2, box[2]), box[3]), fill=colour)
