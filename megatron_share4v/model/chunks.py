"""Construction of this rank's model chunks on its device, with frozen parameters marked."""

from __future__ import annotations

import torch

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.model.pipeline_split import layers_per_stage
from megatron_share4v.model.share4v import PipelineStage, Share4V
from megatron_share4v.model.trainable import apply_trainable
from megatron_share4v.ops.op import Implementation


def build_chunks(
    model: ModelConfig,
    *,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    ops: Implementation = "reference",
    options: LayerOptions = LayerOptions(),
) -> list[Share4V]:
    """Build this rank's chunks in the order of the interleaved schedule; weights are uninitialized.

    With `ops` "native" the library must be loaded already (mcore/backends.py).
    """
    layout = mesh.layout
    chunks = []
    for number in range(layout.virtual):
        stage = PipelineStage(
            stage=layout.stage(pipeline_rank=mesh.coordinates.pipeline, chunk=number),
            num_stages=layout.num_stages,
            chunk=number if layout.virtual > 1 else None,
        )
        counts = layers_per_stage(model, parallel)
        chunk = Share4V(
            model,
            mesh=mesh,
            parallel=parallel,
            dtype=dtype,
            ops=ops,
            options=options,
            layers_per_stage=counts,
            pipeline_stage=stage,
        )
        apply_trainable(chunk, model.trainable)
        chunks.append(chunk.to(mesh.device.torch_device))
    return chunks
