"""Requirements of `parallel.overlap_tensor` besides sequence parallelism.

Transformer Engine's user buffers have one shape, in bf16 or in FP8 with one scale per tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_share4v.config.base import Conflict
from megatron_share4v.config.precision import PrecisionConfig


def overlap_conflicts(
    precision: PrecisionConfig, *, engine: str, pack_length: int | None, preview: int
) -> Iterator[Conflict]:
    """Find settings that the user buffers do not support.

    `engine`, `pack_length`, `preview`: transformer_engine, data.pack_length, train.preview_every_steps.
    """
    for key, value, wrong, why in (
        ("transformer_engine", engine, engine == "none", "its layers have the buffers; use language"),
        ("precision.dtype", precision.dtype, precision.dtype != "bf16", "the buffers are for bf16 and FP8; use bf16"),
        (
            "precision.fp8",
            precision.fp8,
            precision.fp8 in ("blockwise", "mxfp8"),
            "there are no buffers for scales of blocks; use tensorwise or delayed",
        ),
        (
            "data.pack_length",
            pack_length,
            pack_length is None,
            "the buffers have one shape, so all sequences need one length; pack them",
        ),
        ("train.preview_every_steps", preview, preview > 0, "generation has other shapes than the buffers; use 0"),
    ):
        if wrong:
            yield Conflict(
                f"parallel.overlap_tensor true with {key} {'null' if value is None else value}: {why}",
                ("parallel.overlap_tensor", key),
            )
