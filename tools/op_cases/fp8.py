"""Cases and benchmarks of the ops of megatron_share4v/ops/fp8.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_share4v.ops.fp8 import (
    DTYPES,
    SMALLEST_AMAX,
    Format,
    _cast,
    _cast_both,
    _cast_transposed,
    fp8_scale,
)
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw


def _matrices() -> Iterator[tuple[str, torch.Tensor]]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        # Odd, one tile, several tiles of both kinds, more than 65,536 elements for two threads, nothing.
        for shape in ((3, 7), (128, 64), (150, 208), (33, 2064), (0, 16), (16, 0)):
            # Eleven binary orders of magnitude: normal and subnormal numbers.
            spread = draw(shape, dtype=dtype, seed=1).exp2()
            yield f"{name} {'x'.join(map(str, shape))}", draw(shape, dtype=dtype) * spread
        yield f"{name} transposed", draw((40, 24), dtype=dtype).t()
        yield f"{name} misaligned", draw((9 * 16 + 1,), dtype=dtype)[1:].view(9, 16)
        yield f"{name} zeros", torch.zeros(5, 16, dtype=dtype)
        yield (
            f"{name} ties and tiny",
            torch.linspace(-18, 18, 1024).to(dtype).sign()
            * torch.linspace(-18, 9, 1024).exp2().to(dtype).view(1, 1024),
        )


def _scale_cases() -> Iterator[Case]:
    for name, x in _matrices():
        for format in DTYPES:
            yield Case(f"{name} {format}", x.dtype, {"x": x, "format": format})


def _cast_cases(*formats: Format) -> Iterator[Case]:
    for name, x in _matrices():
        for format in formats:
            scale = fp8_scale(x, format=format, implementation="reference")
            yield Case(f"{name} {format}", x.dtype, {"x": x, "scale": scale, "format": format})
            if "ties" in name:
                yield Case(f"{name} {format} saturating", x.dtype, {"x": x, "scale": scale / 50, "format": format})


def _eager_scale(x: torch.Tensor, *, format: Format) -> torch.Tensor:
    return x.abs().amax().float().clamp(min=SMALLEST_AMAX) / torch.finfo(DTYPES[format]).max


def _eager_cast(x: torch.Tensor, *, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Scale, clamp and cast as torchao does."""
    largest = torch.finfo(DTYPES[format]).max
    return (x.float() / scale).clamp(-largest, largest).to(DTYPES[format]).view(torch.uint8)


def _eager_cast_transposed(x: torch.Tensor, *, scale: torch.Tensor, format: Format) -> torch.Tensor:
    return _eager_cast(x, scale=scale, format=format).t().contiguous()


def _eager_cast_both(x: torch.Tensor, *, scale: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    codes = _eager_cast(x, scale=scale, format=format)
    return codes, codes.t().contiguous()


def _benches(*, scaled: bool, bytes_each: int, eager: Callable[..., Any]) -> Iterator[Bench]:
    for rows, columns, where in ((12_416, 11_008, "gpu"), (1024, 4096, "cpu")):

        def make(device: str, rows: int = rows, columns: int = columns) -> dict[str, Any]:
            scale = {"scale": torch.tensor(0.01, device=device)} if scaled else {}
            return {"x": draw((rows, columns), dtype=torch.bfloat16, device=device), "format": "e4m3"} | scale

        yield Bench(f"{rows} x {columns}", where, make, bytes_each * rows * columns, None, eager)


_EXACT = {
    dtype: Tolerance(0.0, "maxima, one division and one rounding are exactly defined")
    for dtype in (torch.float32, torch.bfloat16)
}


def _op(
    name: str,
    function: Callable[..., Any],
    cases: Callable[[], Iterator[Case]],
    bytes_each: int,
    eager: Callable[..., Any],
) -> OpCases:
    benches = partial(_benches, scaled=name != "fp8_scale", bytes_each=bytes_each, eager=eager)
    return OpCases(name, function, (), cases, benches, _EXACT)


OPS = (
    _op("fp8_scale", fp8_scale, _scale_cases, 2, _eager_scale),
    _op("fp8_cast", _cast, lambda: _cast_cases("e4m3", "e5m2"), 3, _eager_cast),
    _op("fp8_cast_transposed", _cast_transposed, lambda: _cast_cases("e5m2"), 3, _eager_cast_transposed),
    _op("fp8_cast_both", _cast_both, lambda: _cast_cases("e4m3"), 4, _eager_cast_both),
)
