"""Padding and horizontal resize of very tall images, without the padded square in memory.

A strip of 500 x 100,000 pixels, padded to a square, has 10 billion pixels, nearly all of one colour. Only the few
output columns that the strip reaches are computed; the others have the colour of the padding. The arithmetic is that of
Pillow's filters (coefficients in units of 2^-22, sums rounded to 8 bits), so the pixels are bit-equal to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_share4v.data.images.policy import Colour, Filter

_PRECISION = 22  # bits after the point of a coefficient
_PIXELS = 1 << 20  # at a time: bounds the memory


@dataclass(frozen=True)
class _Column:
    """Output column: coefficients of the image's pixels from `start` on, and the sum of those of the padding."""

    number: int
    start: int
    coefficients: np.ndarray
    padding: float


def resize_padded_width(image: Image.Image, *, side: int, size: int, resample: Filter, colour: Colour) -> Image.Image:
    """Pad an RGB image to the width `side`, centred, and resize that width to `size`; the height stays."""
    columns = list(_columns(side, size, width=image.width, resample=resample))
    first = columns[0].number
    resized = Image.new("RGB", (size, image.height), colour)
    step = max(1, _PIXELS // image.width)
    for top in range(0, image.height, step):
        rows = np.asarray(image.crop((0, top, image.width, min(top + step, image.height))))
        planes = np.ascontiguousarray(rows.transpose(0, 2, 1), dtype=np.float64)  # [rows, 3, width]
        sums = np.empty((*planes.shape[:2], len(columns)))
        for column in columns:
            part = planes[:, :, column.start : column.start + len(column.coefficients)]
            # Sums of integers below 2^53: exact in float64.
            sums[:, :, column.number - first] = part @ column.coefficients + np.multiply(colour, column.padding)
        values = np.clip(np.floor(sums / 2**_PRECISION + 0.5), 0, 255).astype(np.uint8).transpose(0, 2, 1)
        resized.paste(Image.fromarray(np.ascontiguousarray(values)), (first, top))
    return resized


def _columns(side: int, size: int, *, width: int, resample: Filter) -> Iterator[_Column]:
    """Yield the output columns that the image reaches, in order."""
    reach, weigh = _FILTERS[resample]
    left, scale = (side - width) // 2, side / size
    support = reach * scale
    first = max(0, math.floor((left - support) / scale) - 2)
    for column in range(first, min(size, math.ceil((left + width + support) / scale) + 2)):
        centre = (column + 0.5) * scale
        start, stop = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), side)
        weights = weigh((np.arange(stop - start) + start - centre + 0.5) * (1.0 / scale))
        weights /= np.add.accumulate(weights)[-1]  # added in order, as Pillow does
        fixed = np.trunc(weights * 2**_PRECISION + np.where(weights < 0, -0.5, 0.5))
        inside = fixed[max(left - start, 0) : max(left + width - start, 0)]
        yield _Column(column, max(start - left, 0), inside, fixed.sum() - inside.sum())


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Bicubic filter with a = -0.5."""
    x, a = np.abs(distance), -0.5
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(distance: np.ndarray) -> np.ndarray:
    """Triangle."""
    return np.maximum(1.0 - np.abs(distance), 0.0)


def _lanczos(distance: np.ndarray) -> np.ndarray:
    """Lanczos filter of three lobes. By math.sin, whose last bit is the C library's."""
    return np.array([_sinc(x) * _sinc(x / 3.0) if -3.0 <= x < 3.0 else 0.0 for x in distance.tolist()])


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


_FILTERS: dict[Filter, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "bicubic": (2.0, _bicubic),
    "bilinear": (1.0, _bilinear),
    "lanczos": (3.0, _lanczos),
}
"""Pillow's filters: pixels that they reach to each side, and their weights by distance."""
