"""One pipeline stage of the whole model: tower -> projector -> image slots of the embedding -> decoder -> head -> loss.

Image slots are already in the token ids (data/loading/collate.py); forward only writes features at their positions.

B: sequences; S: positions; N: images; P: slots per image; V: tower width; H: language width; T: positions that have a
label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.data.records import Batch
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.kv_cache import CachedAttentionMetadata
from megatron_share4v.mcore.layer_config import language_config, projector_config, vision_config
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.mcore.layer_specs import tower_spec
from megatron_share4v.mcore.layers import (
    MegatronModule,
    ModelType,
    mark_parallel_weights,
    scatter_to_sequence_parallel_region,
)
from megatron_share4v.model.language import LanguageModel
from megatron_share4v.model.projector import Projector
from megatron_share4v.model.vision import VisionTower
from megatron_share4v.ops.image_merge import image_merge
from megatron_share4v.ops.op import Implementation


@dataclass(frozen=True)
class PipelineStage:
    """Position of a model chunk in the pipeline. `chunk` is None unless a rank holds several (interleaved schedule)."""

    stage: int
    num_stages: int
    chunk: int | None

    @property
    def first(self) -> bool:
        """Whether the chunk holds tower, projector and embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether the chunk holds the head."""
        return self.stage == self.num_stages - 1


class Share4V(MegatronModule):
    """One model chunk: Batch -> hidden states for the next stage, or the summed loss on the last."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        mesh: Mesh,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        ops: Implementation,
        options: LayerOptions,
        layers_per_stage: tuple[int, ...],
        pipeline_stage: PipelineStage,
    ) -> None:
        config = language_config(
            model, parallel=parallel, dtype=dtype, ops=ops, options=options, layers_per_stage=layers_per_stage
        )
        super().__init__(config)
        self.model, self.mesh, self.pipeline_stage, self.vp_stage = model, mesh, pipeline_stage, pipeline_stage.chunk
        # Read by core's schedule and gradient finalization.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.language.tie_word_embeddings
        self.pre_process, self.post_process = pipeline_stage.first, pipeline_stage.last
        trainable = model.trainable
        # Overlapped reduction waits for every bucket, so a micro-batch without images must still give the tower and the
        # projector gradients.
        self.needs_blank_image = parallel.overlap_grad_reduce and (
            trainable.projector or trainable.vision_from_block is not None
        )
        if pipeline_stage.first:
            self.vision = VisionTower(
                vision_config(model, parallel=parallel, dtype=dtype, ops=ops, options=options),
                vision=model.vision,
                mesh=mesh,
                spec=tower_spec(model.vision, mesh=mesh, options=options),
            )
            self.projector = Projector(
                projector_config(model, parallel=parallel, dtype=dtype, ops=ops), model=model, mesh=mesh
            )
        before = sum(layers_per_stage[: pipeline_stage.stage])
        self.language = LanguageModel(
            config,
            language=model.language,
            mesh=mesh,
            options=options,
            numbers=range(before, before + layers_per_stage[pipeline_stage.stage]),
            first=pipeline_stage.first,
            last=pipeline_stage.last,
            chunk=pipeline_stage.chunk,
        )
        mark_parallel_weights(self)

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Set the previous stage's output as input; called by core's schedule."""
        self.language.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return this chunk's copy of a tied embedding; called by core's gradient finalization."""
        if self.pipeline_stage.first:
            return self.language.embedding.weight
        return self.language.head.weight if self.pipeline_stage.last else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return [S, B, H] hidden states, or the summed loss (scalar) on the last stage."""
        hidden = self.language(self.embed(batch) if self.pipeline_stage.first else None, segments=batch.segments)
        if not self.pipeline_stage.last:
            return hidden
        assert batch.target_rows is not None and batch.targets is not None, "the last stage has targets"
        return self.language.summed_loss(hidden, batch.target_rows, batch.targets)

    def forward_logits(
        self, batch: Batch, *, features: torch.Tensor | None = None, step: CachedAttentionMetadata | None = None
    ) -> torch.Tensor:
        """Like `forward`, but the last stage returns its columns of the logits at `batch.target_rows`, [T, vocab / TP].

        `features` [..., H]: precomputed image features in slot order; without them `batch.pixels` go through the tower.
        `step`: the batch is one row of new positions of several sequences, whose earlier ones are in the KV cache.
        """
        hidden = self.language(
            self.embed(batch, features=features) if self.pipeline_stage.first else None,
            segments=batch.segments,
            step=step,
        )
        if not self.pipeline_stage.last:
            return hidden
        assert batch.target_rows is not None, "the last stage has target rows"
        return self.language.logits(hidden, batch.target_rows)

    def embed(self, batch: Batch, *, features: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings [S, B, H] with image features at their slots.

        This rank's part of S under sequence parallelism.
        """
        assert batch.token_ids is not None and batch.image_slots is not None, "the first stage has token ids"
        samples, length = batch.token_ids.shape
        # [S, B], the decoder's order, from the start: avoids a copy.
        flat = self.language.embedding(batch.token_ids.t()).flatten(0, 1)
        if features is None and batch.image_slots.numel():
            assert batch.pixels is not None, "image slots come with pixels"
            features = self.encode_images(batch.pixels)
        if features is not None:
            slots = batch.image_slots % length * samples + batch.image_slots // length
            rows = features.flatten(0, -2)
            rows = rows if batch.feature_rows is None else rows.index_select(0, batch.feature_rows)
            flat = image_merge(flat, features=rows, slots=slots, implementation=self.config.ops)
        elif self.needs_blank_image and torch.is_grad_enabled():
            side = self.model.vision.image_size
            blank = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=flat.device)
            flat = flat + 0.0 * self.encode_images(blank).sum()
        if not flat.requires_grad and torch.is_grad_enabled():
            # A pipeline stage must return a differentiable tensor even when all of it is frozen.
            flat = flat.requires_grad_()
        embeddings = flat.view(length, samples, -1)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.mesh.tp_group)
        return embeddings

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, X, X, C] uint8 -> [N, P, H] embeddings, in slot order."""
        return self.projector(self.vision(pixels)).transpose(0, 1).contiguous()
