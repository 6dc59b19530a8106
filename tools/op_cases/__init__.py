"""Example inputs, tolerances and benchmark shapes of every fused op, one file per file of megatron_share4v/ops."""

from __future__ import annotations

from tools.op_cases import activation, adamw, fp8, image_merge, linear_cross_entropy, norm, patchify, rope

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
