"""Rotary position embedding of queries and keys in one kernel. Su et al. 2021.

Elements i and i + D / 2 of a head are a point in a plane, rotated by angle i of the token's position: the layout of
GPT-NeoX and of Hugging Face's LLaMA.

S: positions; B: sequences; D: width of a head (even).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_share4v.config.model import RopeScalingConfig
from megatron_share4v.ops.op import Implementation, register_op, upcast


def rope(
    query: torch.Tensor,
    *,
    key: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor | None = None,
    implementation: Implementation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated (query, key): [S, B, heads, D] and [S, B, groups, D]; slices of a fused projection are read in place.

    `table` is rope_table's. `positions` [S, B] int64 are its rows, for several samples in one sequence; None: 0 to S -
    1 in each. The gradient is the inverse rotation. A position outside the table raises on the CPU and traps on a GPU.
    """
    if implementation == "native":
        return torch.ops.share4v.rope(query, key, table, positions, False)
    rows = table[: query.size(0), None] if positions is None else table[positions]
    cosine, sine = upcast(rows).unsqueeze(2).chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = upcast(x).chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)

    return rotate(query), rotate(key)


def inverse_frequencies(width: int, *, theta: float, scaling: RopeScalingConfig) -> torch.Tensor:
    """Angle per position of each pair of a head of `width`, [width / 2] fp32 on the CPU, of the scaling's kind.

    `linear`: all divided by `factor`. `llama3` (Llama 3.1): frequencies with more than `high_freq_factor` turns in the
    original length stay, those with less than `low_freq_factor` are divided by `factor`, those between are blended.
    Equal to transformers' values in every bit, so the order of operations matters.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    base = 1.0 / (theta ** (steps / width))
    if scaling.rope_type == "default":
        return base
    slow = base / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / base
    share = (length / wavelength - low) / (high - low)
    blend = (1 - share) * base / scaling.factor + share * base
    return torch.where(wavelength > length / low, slow, torch.where(wavelength < length / high, base, blend))


def rope_table(angles: torch.Tensor) -> torch.Tensor:
    """[positions, D] fp32, cosines before sines, of the angles [positions, D / 2]; once per model and length."""
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, table, positions, ctx.inverse = inputs
    ctx.save_for_backward(table, positions)


def _backward(ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor) -> tuple:
    table, positions = ctx.saved_tensors
    return *torch.ops.share4v.rope(grad_query, grad_key, table, positions, not ctx.inverse), None, None, None


def register_ops() -> None:
    """Register fake kernels and gradients with torch."""
    register_op(
        "rope",
        fake=lambda query, key, table, positions, inverse: (query.new_empty(query.shape), key.new_empty(key.shape)),
        setup_context=_save,
        backward=_backward,
    )


OPS = ("rope",)
