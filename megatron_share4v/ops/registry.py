"""All ops, in one tuple: what tests, benchmarks and loading walk over."""

from __future__ import annotations

from megatron_share4v.ops import activation, adamw, fp8, image_merge, linear_cross_entropy, norm, patchify, rope

OPS = (
    *norm.OPS,
    *image_merge.OPS,
    *patchify.OPS,
    *activation.OPS,
    *rope.OPS,
    *linear_cross_entropy.OPS,
    *adamw.OPS,
    *fp8.OPS,
)
