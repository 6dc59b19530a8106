"""Head and cross-entropy in one, over blocks of the vocabulary: never all logits in memory. T labelled rows, H width, V columns of this rank.

Forward keeps three numbers per row; backward computes each block of logits again, turns it into its gradient in place and is done with
that part of the weight: its gradient is one product over all rows, rounded once, and there is no fp32 copy of it. The price is a fourth
product beside the three of the usual form. Blocks of rows would spare it for an fp32 sum as large as the weight, and would reduce over the
tensor group once per block; here that is three reductions in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_share4v.ops.op import Bench, Case, Implementation, Op, Tolerance, draw, register, upcast

BLOCK = 1 << 23  # logits at a time; 16 MB in bf16
LEAST_COLUMNS = 1024  # products with fewer columns waste the machine


def linear_cross_entropy(
    hidden: torch.Tensor,
    *,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int | None = None,
    group: dist.ProcessGroup | None = None,
    block_columns: int | None = None,
    implementation: Implementation,
) -> torch.Tensor:
    """Sum over rows of -log softmax(hidden @ weight^T)[target]: an fp32 scalar (fp64 for fp64 inputs).

    hidden [T, H], the same on all ranks of `group`; weight [V, H], this rank's rows of the head, rank r's first one being r * V; targets [T]
    int64 ids over all ranks, the same everywhere. `vocabulary` (default: all rows): real ids; rows of the head beyond are padding and take no
    probability. An id outside raises on the CPU and traps on a GPU. Logits and their gradients have the type of `hidden`, sums are fp32.

    The gradient of `hidden` is summed over `group`, as behind ColumnParallelLinear: give `hidden` as it is, not copied to the tensor region.
    All ranks of the group must call, forward and backward, also with T = 0.
    """
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    real, first = weight.size(0) * ranks if vocabulary is None else vocabulary, weight.size(0) * rank
    columns = block_columns or _block_columns(hidden.size(0), weight.size(0))
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, (first, real, columns), group if ranks > 1 else None, implementation
    )


def _block_columns(rows: int, columns: int) -> int:
    """As many as BLOCK allows, but an eighth of the head at most: for few rows, too, the logits stay small beside it."""
    fitting = min(BLOCK // max(rows, 1), columns // 8)
    return max(LEAST_COLUMNS, fitting // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        span: tuple[int, int, int],
        group: dist.ProcessGroup | None,
        implementation: Implementation,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        targets = targets.contiguous()
        maximum = torch.full((hidden.size(0),), torch.finfo(wide).min, dtype=wide, device=hidden.device)
        sums = torch.zeros((2, hidden.size(0)), dtype=wide, device=hidden.device)
        statistics = torch.ops.share4v.cross_entropy_statistics if implementation == "native" else _statistics
        for first, logits, _ in _blocks(hidden, weight, span):
            statistics(logits, targets, first, span[1], maximum, sums[0], sums[1])
        if group is not None:
            own = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            sums[0] *= torch.exp(own - maximum)
            dist.all_reduce(sums, group=group)
        normaliser = maximum + sums[0].log()
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.span, ctx.group, ctx.implementation = span, group, implementation
        return (normaliser - sums[1]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        gradient = torch.ops.share4v.cross_entropy_gradient if ctx.implementation == "native" else _gradient
        scale = grad.reshape(1).to(normaliser.dtype)
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if for_weight else None
        # Summed over the blocks in fp32, rounded once.
        grad_hidden = torch.zeros(hidden.shape, dtype=normaliser.dtype, device=hidden.device) if for_hidden else None
        for first, logits, rows in _blocks(hidden, weight, ctx.span):
            gradient(logits, targets, normaliser, scale, first, ctx.span[1])
            if grad_weight is not None:
                torch.mm(logits.t(), hidden, out=grad_weight[rows])
            if grad_hidden is None:
                continue
            if logits.dtype == grad_hidden.dtype:
                grad_hidden.addmm_(logits, weight[rows])
            else:
                grad_hidden.add_(logits @ weight[rows])
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
            if ctx.group is not None:
                dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight, None, None, None, None


def _blocks(
    hidden: torch.Tensor, weight: torch.Tensor, span: tuple[int, int, int]
) -> Iterator[tuple[int, torch.Tensor, slice]]:
    """(first id, logits, rows of the weight) of each block; all logits lie in the same memory, one after the other."""
    start, _, columns = span
    memory = hidden.new_empty(hidden.size(0) * min(columns, weight.size(0)))
    for begin in range(0, weight.size(0), columns):
        rows = slice(begin, min(begin + columns, weight.size(0)))
        size = rows.stop - begin
        logits = memory[: hidden.size(0) * size].view(hidden.size(0), size)
        yield start + begin, torch.mm(hidden, weight[rows].t(), out=logits), rows


def _statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    vocabulary: int,
    maximum: torch.Tensor,
    total: torch.Tensor,
    target: torch.Tensor,
) -> None:
    real = upcast(logits)[:, : max(0, vocabulary - first)]
    if real.numel() == 0:
        return
    peak = torch.maximum(maximum, real.amax(1))
    total.mul_(torch.exp(maximum - peak)).add_(torch.exp(real - peak.unsqueeze(1)).sum(1))
    maximum.copy_(peak)
    column = targets - first
    here = (column >= 0) & (column < real.size(1))
    target.copy_(torch.where(here, real.gather(1, column.clamp(0, real.size(1) - 1).unsqueeze(1)).squeeze(1), target))


def _gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    scale: torch.Tensor,
    first: int,
    vocabulary: int,
) -> None:
    column = torch.arange(first, first + logits.size(1), device=logits.device)
    slope = torch.exp(upcast(logits) - normaliser.unsqueeze(1)) - (column == targets.unsqueeze(1)).to(normaliser.dtype)
    logits.copy_((slope * scale).masked_fill(column >= vocabulary, 0))


def _register() -> None:
    register("cross_entropy_statistics", fake=lambda logits, targets, first, vocabulary, maximum, total, target: None)
    register("cross_entropy_gradient", fake=lambda logits, targets, normaliser, scale, first, vocabulary: None)


def _cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        # rows, width, columns, real ids, columns of a block
        shapes = {
            "tiny": (2, 3, 5, None, None),
            "odd blocks": (3, 4, 11, None, 4),
            "padding": (7, 24, 40, 37, 16),
            "a block of padding alone": (5, 16, 48, 30, 16),
            "one id": (3, 8, 1, None, None),
            "no rows": (0, 8, 16, None, 8),
            "long rows": (9, 32, 2056, 2050, 1032),
            "many rows": (70, 16, 96, None, 64),
        }
        for which, (rows, width, columns, real, block) in shapes.items():
            targets = torch.randint(0, real or columns, (rows,), generator=torch.Generator().manual_seed(1))
            arguments = {
                "hidden": draw((rows, width), dtype=dtype),
                "weight": draw((columns, width), dtype=dtype, seed=2),
                "targets": targets,
            }
            yield Case(f"{name} {which}", dtype, arguments | {"vocabulary": real, "block_columns": block})
        strided = {
            "hidden": draw((8, 6), dtype=dtype).t(),
            "weight": draw((20, 16), dtype=dtype, seed=1)[:, ::2],
            "targets": torch.arange(12)[::2],
        }
        yield Case(f"{name} strides", dtype, strided)
        large = {
            "hidden": 30 * draw((4, 8), dtype=dtype),
            "weight": draw((64, 8), dtype=dtype, seed=1),
            "targets": torch.arange(4),
        }
        yield Case(f"{name} large logits", dtype, large | {"block_columns": 16})


def _eager(hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As in Hugging Face's models: logits of every position in fp32; positions without a label are -100."""
    labels = torch.full((hidden.size(0),), -100, device=hidden.device).index_copy(0, rows, targets)
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def _native(hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden.index_select(0, rows), weight=weight, targets=targets, implementation="native")


def _benches() -> Iterator[Bench]:
    shapes = (
        ("7B, 3200 of 12416", "gpu", 12_416, 3200, 4096),
        ("256 of 1024, H 1024", "cpu", 1024, 256, 1024),
        ("256 of 256, H 1024", "cpu", 256, 256, 1024),
    )
    for name, where, positions, labelled, width in shapes:

        def make(
            device: str, positions: int = positions, labelled: int = labelled, width: int = width
        ) -> dict[str, Any]:
            return {
                "hidden": draw((positions, width), dtype=torch.bfloat16, device=device),
                "weight": draw((32_000, width), dtype=torch.bfloat16, seed=1, device=device) / width**0.5,
                "targets": torch.randint(0, 32_000, (labelled,), generator=torch.Generator().manual_seed(2)).to(device),
                "rows": torch.arange(0, positions, positions // labelled, device=device)[:labelled],
            }

        read = 2 * width * (32_000 + labelled)
        yield Bench(name, where, make, read, read + 2 * width * (32_000 + positions), _eager, _native)


_TOLERANCES = {
    torch.float32: Tolerance(
        1e-5, "e^x of logits that lost some units of 2**-24, themselves sums of up to 32 products", floor=0.1
    ),
    torch.bfloat16: Tolerance(
        2**-5,
        "logits are rounded to 8 bits, which shifts e^x by 2**-9 of the logit; then their gradient is (2**-9)",
        floor=0.1,
    ),
}

OPS = (
    Op("linear_cross_entropy", linear_cross_entropy, ("hidden", "weight"), _cases, _benches, _TOLERANCES, _register),
)
