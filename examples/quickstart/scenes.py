"""Synthetic scenes of the quickstart: contents and rendering.

A scene is one to three simple objects on a background. Every object has a shape, a colour, a size and a place (a cell
of a 3 x 3 grid); no two objects of a scene share a shape, a colour or a place, so each of these identifies an object.
Scenes and pixels are pure functions of `(seed, split, index)`.

Units: pixels for `image_size`; every other length is a fraction of the image's edge. Colours are 8-bit RGB.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
SHADES = ("gray", "brown", "olive", "slate")
TEXTURES = ("plain", "striped", "dotted")
SPLITS = ("train", "held_out")

_COLOR_RGB = {
    "red": (250, 64, 64),
    "green": (64, 224, 72),
    "blue": (72, 112, 252),
    "yellow": (250, 228, 60),
    "purple": (212, 88, 248),
    "cyan": (64, 228, 244),
}
_SHADE_RGB = {  # darker than every object colour
    "gray": (74, 74, 74),
    "brown": (98, 62, 40),
    "olive": (72, 82, 34),
    "slate": (44, 62, 94),
}
_RADIUS = {"small": 0.09, "large": 0.15}  # fractions of the image's edge
_JITTER = 0.015  # largest shift of an object from the centre of its cell, per axis
_COLOR_JITTER = 14  # largest change of one colour channel, 8-bit steps
_OVERSAMPLE = 3  # drawn this many times larger, then reduced, for smooth edges


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    `shift` is the offset from the centre of its cell, `tint` the change of the three colour channels (8-bit steps); no
    question asks for either.
    """

    shape: str
    color: str
    size: str
    place: str
    shift: tuple[float, float]
    tint: tuple[int, int, int]

    @property
    def row(self) -> int:
        """Row of the cell: 0 at the top, 2 at the bottom."""
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        """Column of the cell: 0 at the left, 2 at the right."""
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Scene:
    """One scene; `objects` are sorted by their colour's position in `COLORS`."""

    seed: int
    split: str
    index: int
    objects: tuple[SceneObject, ...]
    shade: str
    texture: str
    shade_tint: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Name of the scene, unique for one `seed`."""
        return f"{self.split}_{self.index:06d}"


def scene_rng(seed: int, split: str, index: int, purpose: str) -> random.Random:
    """Return the random generator of one purpose of one scene.

    Generators of different purposes, splits and indices are independent: drawing from one never shifts another.
    """
    return random.Random(f"{seed}/{split}/{index}/{purpose}")


def _tint(rng: random.Random) -> tuple[int, int, int]:
    values = [rng.randint(-_COLOR_JITTER, _COLOR_JITTER) for _ in range(3)]
    return values[0], values[1], values[2]


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Generate scene `index` (0 and up) of one split.

    Raises ValueError for a split that is not in `SPLITS` and for a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    if index < 0:
        raise ValueError(f"index must be 0 or more, not {index}")
    rng = scene_rng(seed, split, index, "scene")
    count = rng.randint(1, 3)
    shapes = rng.sample(SHAPES, count)
    colors = sorted(rng.sample(COLORS, count), key=COLORS.index)
    places = rng.sample(PLACES, count)
    objects = tuple(
        SceneObject(
            shape=shape,
            color=color,
            size=rng.choice(SIZES),
            place=place,
            shift=(rng.uniform(-_JITTER, _JITTER), rng.uniform(-_JITTER, _JITTER)),
            tint=_tint(rng),
        )
        for shape, color, place in zip(shapes, colors, places, strict=True)
    )
    return Scene(
        seed=seed,
        split=split,
        index=index,
        objects=objects,
        shade=rng.choice(SHADES),
        texture=rng.choice(TEXTURES),
        shade_tint=_tint(rng),
    )


def _rgb(base: tuple[int, int, int], tint: tuple[int, int, int], gain: int = 0) -> tuple[int, ...]:
    return tuple(min(255, max(0, b + t + gain)) for b, t in zip(base, tint, strict=True))


def _draw_background(draw: ImageDraw.ImageDraw, scene: Scene, edge: int) -> None:
    """Fill a square of `edge` pixels with the scene's shade and texture."""
    base = _SHADE_RGB[scene.shade]
    draw.rectangle((0, 0, edge, edge), fill=_rgb(base, scene.shade_tint))
    accent = _rgb(base, scene.shade_tint, 28)
    rng = scene_rng(scene.seed, scene.split, scene.index, "texture")
    period = edge * rng.uniform(0.11, 0.14)
    start = rng.uniform(0.0, period)
    steps = range(-1, math.ceil(edge / period) + 1)
    if scene.texture == "striped":
        for i in steps:
            top = start + i * period
            draw.rectangle((0, top, edge, top + period * 0.4), fill=accent)
    elif scene.texture == "dotted":
        radius = period * 0.25
        for i in steps:
            for j in steps:
                x, y = start + i * period, start + j * period
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=accent)


def _draw_object(draw: ImageDraw.ImageDraw, item: SceneObject, edge: int) -> None:
    """Draw one object into a square of `edge` pixels."""
    x = ((item.column + 0.5) / 3 + item.shift[0]) * edge
    y = ((item.row + 0.5) / 3 + item.shift[1]) * edge
    r = _RADIUS[item.size] * edge
    fill = _rgb(_COLOR_RGB[item.color], item.tint)
    if item.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif item.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(1, round(0.4 * r)))
    elif item.shape == "square":
        s = 0.88 * r
        draw.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    elif item.shape == "triangle":
        draw.polygon(((x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)), fill=fill)
    elif item.shape == "cross":
        t = 0.34 * r
        draw.rectangle((x - r, y - t, x + r, y + t), fill=fill)
        draw.rectangle((x - t, y - r, x + t, y + r), fill=fill)
    else:
        raise ValueError(f"unknown shape {item.shape!r}")


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """Render the scene as an RGB image of `image_size` x `image_size` pixels.

    A brightness gradient and pixel noise, both random per scene, make every background different. Raises ValueError for
    an `image_size` below 16, where the shapes can no longer be distinguished.
    """
    if image_size < 16:
        raise ValueError(f"image_size must be 16 or more, not {image_size}")
    edge = image_size * _OVERSAMPLE
    picture = Image.new("RGB", (edge, edge))
    draw = ImageDraw.Draw(picture)
    _draw_background(draw, scene, edge)
    for item in scene.objects:
        _draw_object(draw, item, edge)
    pixels = np.asarray(picture.reduce(_OVERSAMPLE), dtype=np.float32)
    rng = scene_rng(scene.seed, scene.split, scene.index, "light")
    angle, strength = rng.uniform(0.0, 2.0 * math.pi), rng.uniform(0.0, 12.0)
    line = np.linspace(-1.0, 1.0, image_size, dtype=np.float32)
    light = strength * (math.cos(angle) * line[None, :] + math.sin(angle) * line[:, None])
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0.0, 3.0, pixels.shape)
    lit = pixels + light[:, :, None] + noise
    return Image.fromarray(np.clip(np.rint(lit), 0, 255).astype(np.uint8))
