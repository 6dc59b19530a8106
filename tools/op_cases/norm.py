"""Cases and benchmarks of the ops of megatron_share4v/ops/norm.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_share4v.ops.norm import add_rms_norm, layer_norm, rms_norm
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw

WIDTH_7B, ROWS_7B = 4096, 12_416  # stage 1: 16 samples of 776 positions
WIDTH_TOWER, ROWS_TOWER = 1024, 16 * 577


def _inputs() -> Iterator[tuple[str, torch.Tensor]]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        # One element, odd, one vector, several vectors of a thread, several rows of a chunk, nothing; 3 x 5 leading
        # dimensions as [S, B, W].
        for shape in ((1, 1), (3, 7), (5, 8), (3, 5, 96), (70, 64), (2, 4104), (0, 16)):
            yield f"{name} {'x'.join(map(str, shape))}", draw(shape, dtype=dtype)
        # Keys of the fused projection, as a norm of each head sees them.
        projection = draw((3, 2, 2, 4 * 20), dtype=dtype)
        yield f"{name} keys", projection[..., 40:60]
        yield f"{name} transposed", draw((6, 40), dtype=dtype).t()
        yield f"{name} misaligned", draw((9 * 16 + 1,), dtype=dtype)[1:].view(9, 16)
        # A large mean: the variance must not be computed as E[x^2] - E[x]^2.
        yield f"{name} offset", draw((4, 128), dtype=dtype) + 100


def _cases(*extra: str, eps: float) -> Iterator[Case]:
    for name, x in _inputs():
        arguments: dict[str, Any] = {"x": x, "eps": eps, "weight": 1 + draw((x.size(-1),), dtype=x.dtype, seed=1) / 4}
        if "residual" in extra:
            arguments["residual"] = draw(tuple(x.shape), dtype=x.dtype, seed=2)
        if "bias" in extra:
            arguments["bias"] = draw((x.size(-1),), dtype=x.dtype, seed=3)
        yield Case(name, x.dtype, arguments)


def _benches(
    *extra: str, shapes: dict[str, tuple[int, int]], reads: int, writes: int, reads_back: int
) -> Iterator[Bench]:
    for name, (rows, width) in shapes.items():

        def make(device: str, rows: int = rows, width: int = width) -> dict[str, Any]:
            x = {
                key: draw((rows, width), dtype=torch.bfloat16, seed=seed, device=device)
                for seed, key in enumerate(("x", "residual")[:reads])
            }
            vectors = {
                key: draw((width,), dtype=torch.bfloat16, device=device)
                for key in ("weight", *(key for key in extra if key == "bias"))
            }
            return {**x, **vectors, "eps": 1e-5}

        size = 2 * rows * width
        yield Bench(
            name,
            "gpu" if rows > 4096 else "cpu",
            make,
            (reads + writes) * size,
            (reads_back + 1) * size,
            _EAGER.get((*extra, "")[0]),
        )


def _eager_rms_norm(x: torch.Tensor, *, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm as in Hugging Face's LlamaRMSNorm."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _eager_add_rms_norm(
    x: torch.Tensor, *, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _eager_rms_norm(total, weight=weight, eps=eps), total


def _eager_layer_norm(x: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, (x.size(-1),), weight, bias, eps)


_EAGER: dict[str, Callable[..., Any]] = {
    "": _eager_rms_norm,
    "residual": _eager_add_rms_norm,
    "bias": _eager_layer_norm,
}
_LANGUAGE = {"language 7B": (ROWS_7B, WIDTH_7B), "language, 1024 rows": (1024, WIDTH_7B)}
_TOWER = {"tower": (ROWS_TOWER, WIDTH_TOWER), "tower, 1 image": (577, WIDTH_TOWER)}
_TOLERANCES = {
    torch.float32: Tolerance(
        2e-6, "sums of up to 4104 terms in another order, in fp32: some units of 2**-24", floor=0.1
    ),
    torch.bfloat16: Tolerance(
        2**-7, "results, and the residual sum before, are rounded to 8 bits (2**-9 each)", floor=0.1
    ),
}
# Subtracting a mean of about 100 costs 7 bits of the deviations, hence of everything after them.
_LAYER_TOLERANCES = {
    **_TOLERANCES,
    torch.float32: Tolerance(2e-5, "subtracting a mean of 100 from fp32 values leaves 17 bits of the deviations", 0.1),
}
OPS = (
    OpCases(
        "rms_norm",
        rms_norm,
        ("x", "weight"),
        lambda: _cases(eps=1e-6),
        lambda: _benches(shapes=_LANGUAGE, reads=1, writes=1, reads_back=2),
        _TOLERANCES,
    ),
    OpCases(
        "add_rms_norm",
        add_rms_norm,
        ("x", "residual", "weight"),
        lambda: _cases("residual", eps=1e-6),
        lambda: _benches("residual", shapes=_LANGUAGE, reads=2, writes=2, reads_back=3),
        _TOLERANCES,
    ),
    OpCases(
        "layer_norm",
        layer_norm,
        ("x", "weight", "bias"),
        lambda: _cases("bias", eps=1e-5),
        lambda: _benches("bias", shapes=_TOWER, reads=1, writes=1, reads_back=2),
        _LAYER_TOLERANCES,
    ),
)
