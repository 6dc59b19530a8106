"""Cases and benchmarks of the ops of megatron_share4v/ops/activation.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from megatron_share4v.ops.activation import bias_gelu, bias_gelu_tanh, bias_quick_gelu, bias_swiglu
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw

Shape = tuple[int, int]
LANGUAGE_7B, TOWER, PROJECTOR = (12_416, 11_008), (16 * 577, 4096), (16 * 576, 4096)
SIGLIP = (16 * 729, 4304)  # SO400M/14 at 384 pixels


def _cases(*, parts: int, biased: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")

        def case(label: str, x: torch.Tensor, dtype: torch.dtype = dtype, name: str = name) -> Case:
            bias = {"bias": draw((x.size(-1),), dtype=dtype, seed=1)} if biased else {}
            return Case(f"{name} {label}", dtype, {"x": x} | bias)

        # One element, odd, one vector, several rows of a chunk, more columns than a block of threads has, nothing; 3 x
        # 5 leading dimensions.
        for *leading, width in ((1, 1), (3, 7), (5, 8), (3, 5, 96), (70, 32), (2, 1032), (0, 16)):
            # Twice the usual spread, to reach both tails.
            yield case("x".join(map(str, (*leading, width))), 2 * draw((*leading, parts * width), dtype=dtype))
        yield case("transposed", draw((parts * 24, 6), dtype=dtype).t())
        yield case("misaligned", draw((9 * parts * 16 + 1,), dtype=dtype)[1:].view(9, parts * 16))
        # Range where exponentials overflow and the distribution saturates.
        yield case("far out", torch.linspace(-300, 300, 2 * parts * 64).to(dtype).view(2, parts * 64))


def _eager_gelu(x: torch.Tensor, *, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias)


def _eager_gelu_tanh(x: torch.Tensor, *, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias, approximate="tanh")


def _eager_quick_gelu(x: torch.Tensor, *, bias: torch.Tensor) -> torch.Tensor:
    x = x + bias
    return x * torch.sigmoid(1.702 * x)


def _eager_swiglu(x: torch.Tensor, *, bias: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def _benches(
    *, large: Shape, small: Shape, parts: int, biased: bool, eager: Callable[..., torch.Tensor]
) -> Iterator[Bench]:
    for (rows, width), where in ((large, "gpu"), (small, "cpu")):

        def make(device: str, rows: int = rows, columns: int = parts * width) -> dict[str, Any]:
            bias = {"bias": draw((columns,), dtype=torch.bfloat16, seed=1, device=device)} if biased else {}
            return {"x": draw((rows, columns), dtype=torch.bfloat16, device=device)} | bias

        size = 2 * rows * width
        yield Bench(f"{rows} rows of {width}", where, make, (parts + 1) * size, (2 * parts + 1) * size, eager)


_TOLERANCES = {
    torch.float32: Tolerance(
        3e-6,
        "exponentials to 2 units of 2**-23, a distribution fitted to 1.5e-7; sums of 70 rows for the bias",
        floor=0.1,
    ),
    torch.bfloat16: Tolerance(2**-8, "results are rounded to 8 bits (2**-9)", floor=0.1),
}


def _op(
    name: str,
    function: Callable[..., torch.Tensor],
    large: Shape,
    rows: int,
    eager: Callable[..., torch.Tensor],
    *,
    parts: int,
    biased: bool,
) -> OpCases:
    return OpCases(
        name,
        function,
        ("x", "bias") if biased else ("x",),
        lambda: _cases(parts=parts, biased=biased),
        lambda: _benches(large=large, small=(rows, large[1]), parts=parts, biased=biased, eager=eager),
        _TOLERANCES,
    )


OPS = (
    _op("bias_gelu", bias_gelu, PROJECTOR, 576, _eager_gelu, parts=1, biased=True),
    _op("bias_gelu_tanh", bias_gelu_tanh, SIGLIP, 729, _eager_gelu_tanh, parts=1, biased=True),
    _op("bias_quick_gelu", bias_quick_gelu, TOWER, 577, _eager_quick_gelu, parts=1, biased=True),
    _op("swiglu", bias_swiglu, LANGUAGE_7B, 256, _eager_swiglu, parts=2, biased=False),
    _op("bias_swiglu", bias_swiglu, LANGUAGE_7B, 256, _eager_swiglu, parts=2, biased=True),
)
