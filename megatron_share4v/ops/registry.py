"""All ops, in one tuple: what tests, benchmarks and loading walk over."""

from __future__ import annotations

from megatron_share4v.ops import adamw, image_merge, linear_cross_entropy, norm, patchify

OPS = (*norm.OPS, *image_merge.OPS, *patchify.OPS, *linear_cross_entropy.OPS, *adamw.OPS)
