"""Fused head and cross-entropy against the unfused form, over a TP group, and its peak memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import run_world

from megatron_share4v.ops.linear_cross_entropy import _block_columns, linear_cross_entropy
from megatron_share4v.ops.op import Implementation
from tools.bench_ops import peak_bytes
from tools.op_cases import OPS
from tools.op_cases.record import draw

ROWS, WIDTH, COLUMNS, REAL = 23, 12, 48, 41
implementations = pytest.mark.parametrize("implementation", ["native", "reference"])


@pytest.fixture(autouse=True)
def native(native_ops: None) -> None:
    """Load the native ops: both implementations are available."""


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    targets = torch.randint(0, REAL, (ROWS,), generator=torch.Generator().manual_seed(3))
    return (
        draw((ROWS, WIDTH), dtype=dtype).requires_grad_(),
        draw((COLUMNS, WIDTH), dtype=dtype, seed=1).requires_grad_(),
        targets,
    )


def usual(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    padded = torch.arange(COLUMNS) >= REAL
    return torch.nn.functional.cross_entropy(logits.masked_fill(padded, float("-inf")), targets, reduction="sum")


@implementations
@pytest.mark.parametrize("block", [None, 7, 16, 41])
def test_loss_and_gradients_equal_the_unfused_form(implementation: Implementation, block: int | None) -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(
        hidden, weight=weight, targets=targets, vocabulary=REAL, block_columns=block, implementation=implementation
    )
    expected = usual(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)  # other order of sums of 41 and 23 terms
    for got, truth in zip(
        torch.autograd.grad(loss * 0.3, (hidden, weight)),
        torch.autograd.grad(expected * 0.3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=2e-6)
    assert not torch.autograd.grad(usual(hidden, weight, targets), weight)[0][REAL:].any()


def test_bf16_weight_gradient_equals_the_unfused_form_bitwise() -> None:
    """One product over all rows of equally rounded logits gradients: bf16 values differ only where e^x differs in its
    last ulp.
    """
    hidden, weight, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(
        hidden, weight=weight, targets=targets, vocabulary=REAL, block_columns=16, implementation="native"
    )
    [got], [truth] = (torch.autograd.grad(value, weight) for value in (loss, usual(hidden, weight, targets)))
    assert (got == truth).float().mean() > 0.98


@implementations
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradients_only_where_required(implementation: Implementation, frozen: str) -> None:
    hidden, weight, targets = inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    linear_cross_entropy(
        hidden, weight=weight, targets=targets, vocabulary=REAL, implementation=implementation
    ).backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("target", [-100, REAL])
def test_target_out_of_range_raises(target: int) -> None:
    hidden, weight, targets = inputs()
    targets[4] = target
    with pytest.raises(RuntimeError, match="index outside its range"):
        linear_cross_entropy(hidden, weight=weight, targets=targets, vocabulary=REAL, implementation="native")


def test_nan_is_not_hidden() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[2, 3] = float("nan")
    loss = linear_cross_entropy(hidden, weight=weight, targets=targets, implementation="native")
    loss.backward()
    assert loss.isnan() and weight.grad.isnan().any()


def test_peak_memory_is_under_a_quarter_of_the_unfused_form() -> None:
    op = next(op for op in OPS if op.name == "linear_cross_entropy")
    bench = next(bench for bench in op.benches() if bench.where == "cpu")
    arguments = bench.make("cpu")
    assert arguments["weight"].size(0) == 32_000 and 4 * len(arguments["rows"]) == len(arguments["hidden"])
    leaves = [arguments[name].requires_grad_() for name in op.differentiable]

    def peak(form: Callable[..., torch.Tensor]) -> int:
        return peak_bytes(lambda: torch.autograd.grad(form(**arguments), leaves), device="cpu")

    logits, block = 2 * 256 * 32_000, 4 * 1024 * _block_columns(256, 32_000, "native")
    assert peak(bench.eager) > 4 * peak(bench.native)
    # Beside the gradients, which every form needs, less than the labelled rows' logits; and a block of the weight in
    # fp32, which torch's bf16 products need on processors without bf16.
    assert peak(bench.native) < sum(leaf.nbytes for leaf in leaves) + logits + block


SETTINGS = [
    (ROWS, "native", torch.float32),
    (ROWS, "reference", torch.float32),
    (ROWS, "native", torch.bfloat16),
    (0, "native", torch.float32),
]


def on_a_rank() -> list[tuple[torch.Tensor, ...]]:
    """Return loss and gradients by core's modules and by the op for each of SETTINGS.

    The gradients are those of hidden states and of this rank's weight.
    """
    import torch.distributed as dist
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.mcore.layer_config import LayerConfig
    from megatron_share4v.mcore.layers import ColumnParallelLinear
    from megatron_share4v.ops.backend import choose_ops_backend
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    choose_ops_backend("native", device="cpu")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    own, results = slice(COLUMNS // ranks * rank, COLUMNS // ranks * (rank + 1)), []
    padded = torch.arange(COLUMNS)[own] >= REAL
    with open_mesh(Layout.for_world(ParallelConfig(tensor=ranks), world_size=ranks), device=Device("cpu")) as mesh:
        for rows, implementation, dtype in SETTINGS:
            hidden, weight, targets = inputs(dtype)
            hidden, targets = hidden[:rows].detach().requires_grad_(), targets[:rows]
            options = {
                "num_layers": 1,
                "hidden_size": WIDTH,
                "num_attention_heads": ranks,
                "tensor_model_parallel_size": ranks,
            }
            config = LayerConfig(**options, use_cpu_initialization=True, params_dtype=dtype)
            head = ColumnParallelLinear(
                WIDTH, COLUMNS, config=config, init_method=torch.nn.init.zeros_, bias=False, tp_group=mesh.tp_group
            )
            with torch.no_grad():
                head.weight.copy_(weight[own])
            loss = linear_cross_entropy(
                hidden,
                weight=head.weight,
                targets=targets,
                vocabulary=REAL,
                group=mesh.tp_group,
                block_columns=10,
                implementation=implementation,
            )
            got = loss.detach(), *torch.autograd.grad(loss / 7, (hidden, head.weight))
            today = got
            if rows:
                logits = head(hidden)[0].float().masked_fill(padded, float("-inf"))
                loss = vocab_parallel_cross_entropy(logits, targets).sum()
                today = loss.detach(), *torch.autograd.grad(loss / 7, (hidden, head.weight))
            results.append((*got, *today))
    return results


def test_tensor_parallel_equals_core_modules_and_one_rank(native_ops: None) -> None:
    for rank, of_settings in enumerate(run_world(2, on_a_rank)):
        for (rows, _, dtype), (loss, grad_hidden, grad_weight, today, today_hidden, today_weight) in zip(
            SETTINGS, of_settings, strict=True
        ):
            hidden, weight, targets = inputs(dtype)
            whole = usual(hidden[:rows], weight, targets[:rows])
            one_hidden, one_weight = torch.autograd.grad(whole / 7, (hidden, weight))
            # Other orders of sums; in bf16, the ranks' partial gradients of hidden states are rounded to 8 bits before
            # they are added.
            close = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-6, "atol": 2**-7}
            torch.testing.assert_close(loss, today, rtol=1e-6, atol=0)
            torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
            own = slice(COLUMNS // 2 * rank, COLUMNS // 2 * (rank + 1))
            for got, expected in (
                (grad_hidden, today_hidden),
                (grad_hidden, one_hidden[:rows]),
                (grad_weight, today_weight),
                (grad_weight, one_weight[own]),
            ):
                torch.testing.assert_close(got, expected, **close)
