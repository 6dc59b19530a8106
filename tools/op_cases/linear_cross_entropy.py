"""Cases and benchmarks of the ops of megatron_share4v/ops/linear_cross_entropy.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_share4v.ops.linear_cross_entropy import linear_cross_entropy
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw


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
        for label, (rows, width, columns, real, block) in shapes.items():
            targets = torch.randint(0, real or columns, (rows,), generator=torch.Generator().manual_seed(1))
            arguments = {
                "hidden": draw((rows, width), dtype=dtype),
                "weight": draw((columns, width), dtype=dtype, seed=2),
                "targets": targets,
            }
            yield Case(f"{name} {label}", dtype, arguments | {"vocabulary": real, "block_columns": block})
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
    """Loss as in Hugging Face's models: logits of every position in fp32; positions without a label are -100."""
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
        "logits are rounded to 8 bits, label shifts e^x by 2**-9 of the logit; then their gradient is (2**-9)",
        floor=0.1,
    ),
}
OPS = (OpCases("linear_cross_entropy", linear_cross_entropy, ("hidden", "weight"), _cases, _benches, _TOLERANCES),)
