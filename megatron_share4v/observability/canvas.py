"""A white sheet for charts: rectangles, lines and text in pixels, saved as a small PNG. What is drawn on it is others' business."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
INK, FAINT = (40, 44, 52), (205, 209, 216)
PALETTE: tuple[Colour, ...] = (
    (63, 105, 170), (226, 135, 67), (104, 159, 96), (186, 85, 96), (140, 112, 176), (150, 118, 98), (216, 160, 200), (120, 128, 140),
)  # fmt: skip
SCALE = 2  # drawn larger and shrunk: smooth edges


class Canvas:
    """width x height pixels; the origin is the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)

    def box(self, x: float, y: float, width: float, height: float, *, fill: Colour) -> None:
        """A filled rectangle; nothing where it is thinner than the sheet can show."""
        left, top, right, bottom = (round(edge * SCALE) for edge in (x, y, x + width, y + height))
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=fill)

    def line(self, x: float, y: float, to_x: float, to_y: float, *, fill: Colour = INK) -> None:
        """A hairline."""
        self._draw.line((x * SCALE, y * SCALE, to_x * SCALE, to_y * SCALE), fill=fill, width=SCALE)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        align: Literal["left", "middle", "right"] = "left",
        fill: Colour = INK,
    ) -> None:
        """One line, its upper edge at y."""
        anchor = {"left": "la", "middle": "ma", "right": "ra"}[align]
        self._draw.text(
            (x * SCALE, y * SCALE), text, fill=fill, font=ImageFont.load_default(size=size * SCALE), anchor=anchor
        )

    def legend(self, x: float, y: float, entries: list[tuple[str, Colour]], *, columns: int, width: float) -> None:
        """A coloured square before each name, row by row."""
        for number, (name, colour) in enumerate(entries):
            left, top = x + number % columns * width, y + number // columns * 20
            self.box(left, top + 1, 12, 12, fill=colour)
            self.text(left + 18, top, name)

    def save(self, path: Path) -> None:
        """As PNG of at most 256 colours."""
        small = self._image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        path.parent.mkdir(parents=True, exist_ok=True)
        small.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
