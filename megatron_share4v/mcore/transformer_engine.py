"""Availability check for NVIDIA's Transformer Engine, without importing it; layer_specs_te.py imports it."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

REMEDY = (
    "install it on a machine with an NVIDIA GPU (transformer-engine[pytorch], built for this torch), "
    "or choose another backend"
)


@functools.cache
def te_unavailable_reason() -> str | None:
    """Return why Transformer Engine cannot be used in this process; None where it can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    # Its extension transformer_engine_torch cannot be looked for: a wheel keeps it outside the import path until
    # transformer_engine.pytorch loads it, which importing megatron-core does.
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    from megatron.core.extensions.transformer_engine import HAVE_TE

    # Core looks up names in it and silently continues where a later version has dropped one.
    return None if HAVE_TE else "megatron-core cannot use the installed Transformer Engine (is its PyTorch part there?)"
