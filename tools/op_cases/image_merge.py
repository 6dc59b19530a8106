"""Cases and benchmarks of the ops of megatron_share4v/ops/image_merge.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_share4v.ops.image_merge import image_merge
from tools.op_cases.record import Bench, Case, OpCases, Tolerance, draw

SEQUENCE, PATCHES, WIDTH = 776, 576, 4096  # one sample of stage 1: an image and 200 text positions


def _cases() -> Iterator[Case]:
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        slots = {
            "one run": (12, 8, torch.arange(3, 9)),
            "everything": (5, 16, torch.arange(5)),
            "odd rows, shuffled": (20, 7, shuffled[:11]),
            "no images": (6, 8, torch.arange(0)),
            "no tokens": (0, 8, torch.arange(0)),
            "wide": (9, 2056, torch.tensor([8, 0, 4])),
        }
        for label, (length, width, at) in slots.items():
            tokens, features = draw((length, width), dtype=dtype), draw((len(at), width), dtype=dtype, seed=1)
            yield Case(f"{name} {label}", dtype, {"tokens": tokens, "features": features, "slots": at})
        strided = {
            "tokens": draw((8, 10), dtype=dtype).t(),
            "features": draw((4, 16), dtype=dtype, seed=1)[:, ::2],
            "slots": shuffled[shuffled < 8][::2],
        }
        yield Case(f"{name} strides", dtype, strided)


def _benches() -> Iterator[Bench]:
    for name, where, samples, width in (
        ("16 samples, 7B", "gpu", 16, WIDTH),
        ("2 samples, width 1024", "cpu", 2, 1024),
        ("1 sample, 7B", "cpu", 1, WIDTH),
    ):

        def make(device: str, samples: int = samples, width: int = width) -> dict[str, Any]:
            slots = (torch.arange(samples).unsqueeze(1) * SEQUENCE + torch.arange(PATCHES) + 35).flatten().to(device)
            tokens = draw((samples * SEQUENCE, width), dtype=torch.bfloat16, device=device)
            return {
                "tokens": tokens,
                "features": draw((len(slots), width), dtype=torch.bfloat16, device=device),
                "slots": slots,
            }

        rows, images, row_bytes = samples * SEQUENCE, samples * PATCHES, 2 * width
        yield Bench(name, where, make, 2 * rows * row_bytes, (2 * rows + images) * row_bytes)


OPS = (
    OpCases(
        "image_merge",
        image_merge,
        ("tokens", "features"),
        _cases,
        _benches,
        {dtype: Tolerance(0.0, "values are copied") for dtype in (torch.float32, torch.bfloat16)},
    ),
)
