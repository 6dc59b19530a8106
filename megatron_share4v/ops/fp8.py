"""FP8 scale and cast, one scale per tensor. Micikevicius et al. 2022 ("FP8 formats for deep learning").

Non-finite values are never hidden: they make the scale non-finite, hence everything computed with it.

R: rows; C: columns; x = codes * scale.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_share4v.ops.op import Implementation, register_op

Format = Literal["e4m3", "e5m2"]
DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SMALLEST_AMAX = 1e-12
"""Smallest amax that a scale is computed for: zeros need a scale, and 448 over less approaches the end of fp32."""
DIM_MULTIPLE = 16
"""FP8 matrix products need dimensions in multiples of this."""


def fp8_scale(x: torch.Tensor, *, format: Format, implementation: Implementation) -> torch.Tensor:
    """[] fp32: amax of `x` over the largest number of the format. Infinity or NaN where `x` has one."""
    if implementation == "native":
        return torch.ops.share4v.fp8_scale(x, format == "e5m2", SMALLEST_AMAX)
    maximum = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    return maximum.clamp(min=SMALLEST_AMAX) / torch.finfo(DTYPES[format]).max


def fp8_cast(x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation) -> torch.Tensor:
    """[R, C] codes: x / scale rounded to nearest, saturated at the largest number; non-finite values become NaN."""
    return _cast(x, scale=scale, format=format, implementation=implementation).view(DTYPES[format])


def fp8_cast_transposed(
    x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation
) -> torch.Tensor:
    """[C, R'] contiguous transposed codes; R' is R rounded up to a multiple of 16, padded with zeros."""
    return _cast_transposed(x, scale=scale, format=format, implementation=implementation).view(DTYPES[format])


def fp8_cast_both(
    x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of fp8_cast and fp8_cast_transposed from one read of `x`."""
    codes, transposed = _cast_both(x, scale=scale, format=format, implementation=implementation)
    return codes.view(DTYPES[format]), transposed.view(DTYPES[format])


def _cast(x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation) -> torch.Tensor:
    """Codes as bytes: torch neither compares nor fills 8-bit floats."""
    if implementation == "native":
        return torch.ops.share4v.fp8_cast(x, scale, format == "e5m2")
    maximum = torch.finfo(DTYPES[format]).max
    # In fp32 even where x is fp64: the double rounding of the quotient is part of the result.
    value = x.float() * (1 / scale.float())
    return value.clamp(-maximum, maximum).where(value.isfinite(), float("nan")).to(DTYPES[format]).view(torch.uint8)


def _cast_transposed(
    x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation
) -> torch.Tensor:
    if implementation == "native":
        return torch.ops.share4v.fp8_cast_transposed(x, scale, format == "e5m2")
    codes = _cast(x, scale=scale, format=format, implementation="reference")
    return torch.nn.functional.pad(codes, (0, 0, 0, -x.size(0) % DIM_MULTIPLE)).t().contiguous()


def _cast_both(
    x: torch.Tensor, *, scale: torch.Tensor, format: Format, implementation: Implementation
) -> tuple[torch.Tensor, torch.Tensor]:
    if implementation == "native":
        return torch.ops.share4v.fp8_cast_both(x, scale, format == "e5m2")
    codes = _cast(x, scale=scale, format=format, implementation="reference")
    return codes, _cast_transposed(x, scale=scale, format=format, implementation="reference")


def _fake_cast(x: torch.Tensor, scale: torch.Tensor, e5m2: bool) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _fake_cast_transposed(x: torch.Tensor, scale: torch.Tensor, e5m2: bool) -> torch.Tensor:
    return x.new_empty(x.size(1), (x.size(0) + DIM_MULTIPLE - 1) // DIM_MULTIPLE * DIM_MULTIPLE, dtype=torch.uint8)


def register_ops() -> None:
    """Register fake kernels with torch."""
    register_op("fp8_scale", fake=lambda x, e5m2, least: x.new_empty((), dtype=torch.float32))
    register_op("fp8_cast", fake=_fake_cast)
    register_op("fp8_cast_transposed", fake=_fake_cast_transposed)
    register_op("fp8_cast_both", fake=lambda *arguments: (_fake_cast(*arguments), _fake_cast_transposed(*arguments)))


OPS = (
    "fp8_scale",
    "fp8_cast",
    "fp8_cast_transposed",
    "fp8_cast_both",
)
