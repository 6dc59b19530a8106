"""Tensor-parallel messages behind matrix products: Transformer Engine's user buffers, which its layers gather into and scatter from piece by piece
while they multiply. Written against Transformer Engine 2.20 and megatron-core 0.16, by reading; no GPU has run it.
"""

from __future__ import annotations

import torch

from megatron_share4v.config.run import RunConfig
from megatron_share4v.mcore.groups import Mesh


def initialize_tp_comm_overlap(config: RunConfig, *, mesh: Mesh) -> None:
    """Make the buffers, where `parallel.overlap_tensor` asks for them: once per process, before the layers, which look for them as they are built.

    Collective over all ranks. Tensor groups are ranks in a row, as the engine takes them to be. Buffers are [positions of a micro-batch on all ranks of a
    tensor group, width]; layers in FP8 have theirs in 8 bits, those that stay in bf16, or go back to it under the guard, have others.
    """
    if not config.parallel.overlap_tensor:
        return
    from transformer_engine.pytorch import UserBufferQuantizationMode, initialize_ub

    assert config.data.pack_length is not None, "the configuration refuses lengths that differ"
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
