"""Scale and cast to 8-bit floating point, one scale per tensor. Micikevicius et al. 2022 ("FP8 formats for deep learning").

R rows, C columns; x = codes * scale. What is not finite is never hidden: it makes the scale non-finite, hence all that is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch

from megatron_share4v.ops.op import Bench, Case, Implementation, Op, Tolerance, draw, register

Format = Literal["e4m3", "e5m2"]
DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LEAST = 1e-12
"""Smallest magnitude that a scale is made for: 448 over anything smaller nears the end of fp32, and zeros need some scale."""
MULTIPLE = 16
"""FP8 matrix products want widths in multiples of this."""


def fp8_scale(x: torch.Tensor, *, format: Format, implementation: Implementation) -> torch.Tensor:
    """[] fp32: the largest magnitude of `x` over the largest number of the format. Infinity or NaN where `x` has one."""
    if implementation == "native":
        return torch.ops.share4v.fp8_scale(x, format == "e5m2", LEAST)
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    return largest.clamp(min=LEAST) / torch.finfo(DTYPES[format]).max


def fp8_cast(x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation) -> torch.Tensor:
    """[R, C] in the format: x / scale to nearest, beyond the largest number to the largest, not finite to NaN."""
    return _straight(x, scale=scale, format=format, implementation=implementation).view(DTYPES[format])


def fp8_cast_transposed(
    x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation
) -> torch.Tensor:
    """[C, R'], contiguous: the same transposed, R' the next multiple of 16 from R on, filled with zeros."""
    return _across(x, scale=scale, format=format, implementation=implementation).view(DTYPES[format])


def fp8_cast_both(
    x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8_cast's and fp8_cast_transposed's result, reading `x` once."""
    straight, across = _both(x, scale=scale, format=format, implementation=implementation)
    return straight.view(DTYPES[format]), across.view(DTYPES[format])


def _straight(x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation) -> torch.Tensor:
    """Codes as bytes: torch compares, and fills, no 8-bit floats."""
    if implementation == "native":
        return torch.ops.share4v.fp8_cast(x, scale, format == "e5m2")
    largest = torch.finfo(DTYPES[format]).max
    # In fp32 even where x is fp64: that the quotient is rounded twice is part of the result.
    value = x.float() * (1 / scale.float())
    return value.clamp(-largest, largest).where(value.isfinite(), float("nan")).to(DTYPES[format]).view(torch.uint8)


def _across(x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation) -> torch.Tensor:
    if implementation == "native":
        return torch.ops.share4v.fp8_cast_transposed(x, scale, format == "e5m2")
    codes = _straight(x, scale=scale, format=format, implementation="reference")
    return torch.nn.functional.pad(codes, (0, 0, 0, -x.size(0) % MULTIPLE)).t().contiguous()


def _both(
    x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation
) -> tuple[torch.Tensor, torch.Tensor]:
    if implementation == "native":
        return torch.ops.share4v.fp8_cast_both(x, scale, format == "e5m2")
    return tuple(
        function(x, scale=scale, format=format, implementation="reference") for function in (_straight, _across)
    )


def _fake_straight(x: torch.Tensor, scale: torch.Tensor, e5m2: bool) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _fake_across(x: torch.Tensor, scale: torch.Tensor, e5m2: bool) -> torch.Tensor:
    return x.new_empty(x.size(1), (x.size(0) + MULTIPLE - 1) // MULTIPLE * MULTIPLE, dtype=torch.uint8)


def _register() -> None:
    register("fp8_scale", fake=lambda x, e5m2, least: x.new_empty((), dtype=torch.float32))
    register("fp8_cast", fake=_fake_straight)
    register("fp8_cast_transposed", fake=_fake_across)
    register("fp8_cast_both", fake=lambda *arguments: (_fake_straight(*arguments), _fake_across(*arguments)))


def _matrices() -> Iterator[tuple[str, torch.Tensor]]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        # Odd, one tile, several tiles of both kinds, more than 65,536 elements for two threads, nothing.
        for shape in ((3, 7), (128, 64), (150, 208), (33, 2064), (0, 16), (16, 0)):
            # Eleven binary orders of magnitude: normal numbers and those without leading one.
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
    return x.abs().amax().float().clamp(min=LEAST) / torch.finfo(DTYPES[format]).max


def _eager_straight(x: torch.Tensor, *, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """As torchao does it."""
    largest = torch.finfo(DTYPES[format]).max
    return (x.float() / scale).clamp(-largest, largest).to(DTYPES[format]).view(torch.uint8)


def _eager_across(x: torch.Tensor, *, scale: torch.Tensor, format: Format) -> torch.Tensor:
    return _eager_straight(x, scale=scale, format=format).t().contiguous()


def _eager_both(x: torch.Tensor, *, scale: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    codes = _eager_straight(x, scale=scale, format=format)
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
) -> Op:
    benches = partial(_benches, scaled=name != "fp8_scale", bytes_each=bytes_each, eager=eager)
    return Op(name, function, (), cases, benches, _EXACT, _register)


OPS = (
    _op("fp8_scale", fp8_scale, _scale_cases, 2, _eager_scale),
    _op("fp8_cast", _straight, lambda: _cast_cases("e4m3", "e5m2"), 3, _eager_straight),
    _op("fp8_cast_transposed", _across, lambda: _cast_cases("e5m2"), 3, _eager_across),
    _op("fp8_cast_both", _both, lambda: _cast_cases("e4m3"), 4, _eager_both),
)
