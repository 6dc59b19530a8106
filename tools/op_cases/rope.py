"""Cases and benchmarks of the ops of megatron_share4v/ops/rope.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_share4v.ops.rope import rope, rope_table
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw

LENGTH_7B, HEADS_7B, WIDTH_7B = 776, 32, 128


def _angles(places: int, width: int, *, device: str = "cpu") -> torch.Tensor:
    inverse = 10000.0 ** -(torch.arange(0, width, 2, device=device).float() / width)
    return torch.outer(torch.arange(places, device=device).float(), inverse)


def _cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        # One point, odd, grouped queries, head widths that are no power of two, more heads than a block handles at
        # once, wider than a block, nothing.
        shapes = (
            (1, 1, 1, 1, 2),
            (5, 2, 3, 1, 6),
            (7, 3, 4, 2, 32),
            (3, 2, 4, 2, 20),
            (2, 2, 3, 1, 80),
            (2, 1, 40, 8, 16),
            (3, 1, 2, 2, 544),
            (0, 2, 2, 1, 8),
        )
        for length, batch, heads, groups, width in shapes:
            shared = {
                "key": draw((length, batch, groups, width), dtype=dtype, seed=1),
                "table": rope_table(_angles(40, width)),
            }
            arguments = {"query": draw((length, batch, heads, width), dtype=dtype), **shared}
            label = f"{name} {length}x{batch}x{heads}+{groups}x{width}"
            yield Case(label, dtype, arguments)
            if length:
                positions = torch.randint(0, 40, (length, batch), generator=torch.Generator().manual_seed(2))
                yield Case(f"{label} at positions", dtype, arguments | {"positions": positions})
        fused, table = draw((4, 2, 5 * 16), dtype=dtype), rope_table(_angles(40, 16))
        query, key = (part.unflatten(-1, (-1, 16)) for part in fused.split((3 * 16, 2 * 16), dim=-1))
        yield Case(f"{name} slices", dtype, {"query": query, "key": key, "table": table})
        transposed = (part.transpose(0, 1) for part in (query, key))
        yield Case(
            f"{name} transposed", dtype, {**dict(zip(("query", "key"), transposed, strict=True)), "table": table}
        )
        # One sequence, as attention's backward leaves it: contiguous, although the stride of its second dimension is
        # that of the whole tensor.
        whole = [draw((1, 4, heads, 16), dtype=dtype, seed=heads).transpose(0, 1) for heads in (3, 2)]
        yield Case(f"{name} one sequence", dtype, {"query": whole[0], "key": whole[1], "table": table})
        odd = draw((4 * 2 * 48 + 1,), dtype=dtype)[1:].view(4, 2, 3, 16)
        yield Case(f"{name} misaligned", dtype, {"query": odd, "key": key, "table": table})


def _eager(
    query: torch.Tensor, *, key: torch.Tensor, table: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation as in megatron-core and Hugging Face: both halves of the table repeated, in the dtype of the queries."""
    rows = (table[: query.size(0), None] if positions is None else table[positions]).unsqueeze(2).to(query.dtype)
    cosine, sine = (torch.cat((half, half), dim=-1) for half in rows.chunk(2, dim=-1))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    return rotate(query), rotate(key)


def _benches() -> Iterator[Bench]:
    for batch, where in ((16, "gpu"), (1, "cpu")):

        def make(device: str, batch: int = batch) -> dict[str, Any]:
            shape = (LENGTH_7B, batch, HEADS_7B, WIDTH_7B)
            query, key = (draw(shape, dtype=torch.bfloat16, seed=seed, device=device) for seed in range(2))
            positions = torch.arange(LENGTH_7B, device=device).unsqueeze(1).repeat(1, batch) % 400
            return {
                "query": query,
                "key": key,
                "table": rope_table(_angles(LENGTH_7B, WIDTH_7B, device=device)),
                "positions": positions,
            }

        size = 2 * 2 * LENGTH_7B * batch * HEADS_7B * WIDTH_7B
        yield Bench(f"7B, {batch} x {LENGTH_7B}", where, make, 2 * size, 2 * size, _eager)


OPS = (
    OpCases(
        "rope",
        rope,
        ("query", "key"),
        _cases,
        _benches,
        {
            torch.float32: Tolerance(5e-7, "two products and a sum in fp32: some units of 2**-24", floor=0.1),
            torch.bfloat16: Tolerance(2**-8, "results are rounded to 8 bits (2**-9)", floor=0.1),
        },
    ),
)
