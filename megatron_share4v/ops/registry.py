"""Registry of the fused ops: their names, and the registration of their fake kernels and gradients."""

from __future__ import annotations

from megatron_share4v.ops import activation, adamw, fp8, image_merge, linear_cross_entropy, norm, patchify, rope

_MODULES = (norm, image_merge, patchify, activation, rope, linear_cross_entropy, adamw, fp8)

OPS: tuple[str, ...] = tuple(name for module in _MODULES for name in module.OPS)


def register_all() -> None:
    """Register fake kernels and gradients of all ops of the loaded library; a second call changes nothing."""
    for module in _MODULES:
        module.register_ops()
