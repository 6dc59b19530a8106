"""Overlap of TP communication with matrix products: Transformer Engine's user buffers.

Written against Transformer Engine 2.20 and megatron-core 0.16 from their sources; not run on a GPU.
"""

from __future__ import annotations

import torch

from megatron_share4v.config.run import RunConfig
from megatron_share4v.mcore.groups import Mesh


def initialize_tp_comm_overlap(config: RunConfig, *, mesh: Mesh) -> None:
    """Allocate the user buffers when `parallel.overlap_tensor` is set: once per process, before the layers are built.

    Collective over all ranks. Transformer Engine assumes that a TP group is consecutive ranks. Buffers are [positions
    of a micro-batch on all ranks of a TP group, width]; FP8 layers use 8-bit buffers, layers that stay in bf16, or fall
    back to it, use bf16 buffers.
    """
    if not config.parallel.overlap_tensor:
        return
    from transformer_engine.pytorch import UserBufferQuantizationMode, initialize_ub

    assert config.data.pack_length is not None, "the configuration requires data.pack_length"
    positions = config.data.pack_length * config.train.micro_batch_size // mesh.layout.context
    precision, layers = config.precision, config.model.language.num_layers
    covered = precision.fp8_layers(layers)
    modes = [UserBufferQuantizationMode.FP8] if covered else []
    if len(covered) < layers or precision.guard_every_steps:
        modes.append(UserBufferQuantizationMode.NONE)
    initialize_ub(
        shape=[positions, config.model.language.hidden_size],
        tp_size=mesh.layout.tensor,
        quantization_modes=modes,
        dtype=torch.bfloat16,
        bootstrap_backend=mesh.device.backend,
    )
