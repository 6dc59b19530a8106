"""A picture of a scene with what the model says of it underneath, for people to look at."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw


def captioned_picture(path: Path, text: str, *, side: int = 320, margin: int = 12) -> Image.Image:
    """The scene at `path`, enlarged to `side` pixels, with `text` under it, wrapped."""
    words, lines = text.split(), [""]
    for word in words:
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 60 else [*lines, word]
    canvas = Image.new("RGB", (side + 2 * margin, side + 3 * margin + 14 * len(lines)), "white")
    with Image.open(path) as scene:
        canvas.paste(scene.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    ImageDraw.Draw(canvas).multiline_text((margin, side + 2 * margin), "\n".join(lines), fill="black", spacing=2)
    return canvas
