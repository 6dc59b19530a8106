"""Fused output head and cross-entropy over blocks of the vocabulary, without all logits in memory.

Forward saves three numbers per row; backward recomputes each block of logits, turns it into its gradient in place and
finishes that part of the weight: its gradient is one product over all rows, rounded once, without an fp32 copy. The
cost is a fourth product beside the three of the unfused form. Blocks of rows would avoid it, but need an fp32 sum as
large as the weight and a TP reduction per block; here there are three reductions in all.

T: labelled rows; H: width; V: vocabulary columns of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_share4v.ops.op import Implementation, register_op, upcast

BLOCK_LOGITS = 1 << 23  # logits at a time; 16 MB in bf16
BLOCK_SHARE: dict[Implementation, int] = {"native": 12, "reference": 32}
"""Blocks in a head with few labelled rows: the peak stays under an eighth of the logits. The reference holds a
second copy of a block, in fp32.
"""
MIN_BLOCK_COLUMNS = 1024  # products with fewer columns are inefficient


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

    hidden [T, H], the same on all ranks of `group`; weight [V, H], this rank's rows of the head, rank r's first one
    being r * V; targets [T] int64 ids over all ranks, the same everywhere. `vocabulary` (default: all rows): number of
    real ids; rows of the head beyond are padding and get no probability. An id out of range raises on the CPU and traps
    on a GPU. Logits and their gradients have the dtype of `hidden`, sums are fp32.

    The gradient of `hidden` is summed over `group`, as behind ColumnParallelLinear: pass `hidden` as it is, not copied
    to the tensor-parallel region. All ranks of the group must call, forward and backward, also with T = 0.
    """
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    real, first = weight.size(0) * ranks if vocabulary is None else vocabulary, weight.size(0) * rank
    columns = block_columns or _block_columns(hidden.size(0), weight.size(0), implementation)
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, (first, real, columns), group if ranks > 1 else None, implementation
    )


def _block_columns(rows: int, columns: int, implementation: Implementation) -> int:
    """Columns of a block: as many as BLOCK_LOGITS allows, but at most a share (BLOCK_SHARE) of the head.

    The limit keeps the logits small beside the head also for few rows.
    """
    fitting = min(BLOCK_LOGITS // max(rows, 1), columns // BLOCK_SHARE[implementation])
    return max(MIN_BLOCK_COLUMNS, fitting // 64 * 64)


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
        accumulate_dtype = torch.promote_types(hidden.dtype, torch.float32)
        targets = targets.contiguous()
        maximum = torch.full(
            (hidden.size(0),), torch.finfo(accumulate_dtype).min, dtype=accumulate_dtype, device=hidden.device
        )
        sums = torch.zeros((2, hidden.size(0)), dtype=accumulate_dtype, device=hidden.device)
        statistics = torch.ops.share4v.cross_entropy_statistics if implementation == "native" else _statistics
        for first, logits, _ in _blocks(hidden, weight, span):
            statistics(logits, targets, first, span[1], maximum, sums[0], sums[1])
        if group is not None:
            own = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            sums[0] *= torch.exp(own - maximum)
            dist.all_reduce(sums, group=group)
        logsumexp = maximum + sums[0].log()
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.span, ctx.group, ctx.implementation = span, group, implementation
        return (logsumexp - sums[1]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        gradient = torch.ops.share4v.cross_entropy_gradient if ctx.implementation == "native" else _gradient
        scale = grad.reshape(1).to(logsumexp.dtype)
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if for_weight else None
        # Summed over the blocks in fp32, rounded once.
        grad_hidden = torch.zeros(hidden.shape, dtype=logsumexp.dtype, device=hidden.device) if for_hidden else None
        for first, logits, rows in _blocks(hidden, weight, ctx.span):
            gradient(logits, targets, logsumexp, scale, first, ctx.span[1])
            if grad_weight is not None:
                torch.mm(logits.t(), hidden, out=grad_weight[rows])
            if grad_hidden is None:
                continue
            if logits.dtype == grad_hidden.dtype:
                torch.addmm(grad_hidden, logits, weight[rows], out=grad_hidden)
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
    """Yield (first id, logits, rows of the weight) of each block; all blocks use the same memory."""
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
    real = logits[:, : max(0, vocabulary - first)]
    if real.numel() == 0:
        return
    column = targets - first
    here = (column >= 0) & (column < real.size(1))
    chosen = upcast(real.gather(1, column.clamp(0, real.size(1) - 1).unsqueeze(1)).squeeze(1))
    target.copy_(torch.where(here, chosen, target))
    peak = torch.maximum(maximum, upcast(real.amax(1)))
    weights = real.to(maximum.dtype, copy=True).sub_(peak.unsqueeze(1)).exp_()
    total.mul_(torch.exp(maximum - peak)).add_(weights.sum(1))
    maximum.copy_(peak)


def _gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: torch.Tensor,
    first: int,
    vocabulary: int,
) -> None:
    slope = logits.to(logsumexp.dtype, copy=True).sub_(logsumexp.unsqueeze(1)).exp_()
    column = targets - first
    here = (column >= 0) & (column < logits.size(1))
    slope.scatter_add_(1, column.clamp(0, logits.size(1) - 1).unsqueeze(1), -here.to(slope.dtype).unsqueeze(1))
    slope[:, max(0, vocabulary - first) :] = 0
    logits.copy_(slope.mul_(scale))


def register_ops() -> None:
    """Register fake kernels with torch."""
    register_op(
        "cross_entropy_statistics", fake=lambda logits, targets, first, vocabulary, maximum, total, target: None
    )
    register_op("cross_entropy_gradient", fake=lambda logits, targets, logsumexp, scale, first, vocabulary: None)


OPS = ("linear_cross_entropy",)
