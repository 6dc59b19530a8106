"""The whole model, one pipeline stage of it: tower -> projector -> image slots of the embedding -> decoder -> head -> loss.

Shapes: B sequences, S positions, N images, P slots per image, V tower width, H language width, T positions that carry a label.
Image slots are already in the token ids (data/loading/collate.py); forward only writes features at their positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import ParallelConfig
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
    """Which part of the model a chunk is. `chunk` is None unless a rank holds several (interleaved schedule)."""

    stage: int
    num_stages: int
    chunk: int | None

    @property
    def first(self) -> bool:
        """Holds tower, projector and embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Holds the head."""
        return self.stage == self.num_stages - 1


class Share4V(MegatronModule):
    """One model chunk. Called with a Batch, it returns hidden states for the next stage, or the summed loss on the last."""

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
        place: PipelineStage,
    ) -> None:
        shared = {"parallel": parallel, "dtype": dtype, "ops": ops}
        config = language_config(model, options=options, layers_per_stage=layers_per_stage, **shared)
        super().__init__(config)
        self.model, self.mesh, self.place, self.vp_stage = model, mesh, place, place.chunk
        # Read by core's schedule and gradient finalisation.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process, self.post_process = place.first, place.last
        trainable = model.trainable
        # Overlapped reduction waits for every bucket, so a micro-batch without images must still give the tower and the projector gradients.
        self.needs_blank_image = parallel.overlap_grad_reduce and (
            trainable.projector or trainable.vision_from_block is not None
        )
        if place.first:
            self.vision = VisionTower(
                vision_config(model, options=options, **shared),
                vision=model.vision,
                mesh=mesh,
                spec=tower_spec(mesh=mesh, options=options),
            )
            self.projector = Projector(projector_config(model, **shared), model=model, mesh=mesh)
        before = sum(layers_per_stage[: place.stage])
        self.language = LanguageModel(
            config,
            language=model.language,
            mesh=mesh,
            options=options,
            numbers=range(before, before + layers_per_stage[place.stage]),
            first=place.first,
            last=place.last,
            chunk=place.chunk,
        )
        mark_parallel_weights(self)

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Called by core's schedule with the previous stage's output."""
        self.language.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, batch: Batch) -> torch.Tensor:
        """[S, B, H] hidden states, or the summed loss (scalar) on the last stage."""
        hidden = self.language(self.embed(batch) if self.place.first else None, segments=batch.segments)
        return self.language.summed_loss(hidden, batch.target_rows, batch.targets) if self.place.last else hidden

    def forward_logits(
        self, batch: Batch, *, features: torch.Tensor | None = None, step: CachedAttentionMetadata | None = None
    ) -> torch.Tensor:
        """Like `forward`, but the last stage answers with its columns of the logits at `batch.target_rows`, [T, vocab / tensor].

        `features` [..., H] are image features computed before, in slot order; without them `batch.pixels` goes through the tower. `step` says that the batch is one row of
        new positions of several sequences, and where their earlier ones are kept.
        """
        hidden = self.language(
            self.embed(batch, features=features) if self.place.first else None, segments=batch.segments, step=step
        )
        return self.language.logits(hidden, batch.target_rows) if self.place.last else hidden

    def embed(self, batch: Batch, *, features: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings [S, B, H] (this rank's part of S under sequence parallelism) with image features at their slots."""
        samples, length = batch.token_ids.shape
        # In the order [S, B] from the start: the decoder's, which would otherwise cost a copy.
        flat = self.language.embedding(batch.token_ids.t()).flatten(0, 1)
        if features is None and batch.image_slots.numel():
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
            # A pipeline stage must hand on something differentiable, also when all of it is frozen.
            flat = flat.requires_grad_()
        embeddings = flat.view(length, samples, -1)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.mesh.tp_group)
        return embeddings

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, H, W, C] uint8 -> [N, P, H] embeddings, in slot order."""
        return self.projector(self.vision(pixels)).transpose(0, 1).contiguous()
