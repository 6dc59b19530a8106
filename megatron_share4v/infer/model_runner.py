"""Executes step plans on one TP rank: holds its model shard, its heads' KV cache, and the image feature cache."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from megatron_share4v.data.records import Batch
from megatron_share4v.infer.step_plan import StepPlan
from megatron_share4v.mcore.kv_cache import CachedAttentionMetadata, KVCache
from megatron_share4v.model.share4v import Share4V

_EMPTY: dict[str, Any] = {field.name: None for field in fields(Batch)}


class ModelRunner:
    """Model, KV cache and image features of one TP rank. All TP ranks run the same plans in the same order."""

    def __init__(self, model: Share4V, *, rows: int) -> None:
        assert model.pipeline_stage.first and model.pipeline_stage.last and not model.config.sequence_parallel, (
            "generation needs all layers on each rank and no sequence parallelism"
        )
        self.model, self.mesh = model, model.mesh
        self.device = model.mesh.device.torch_device
        self.cache = KVCache(model.config, rows=rows, device=self.device)
        self._features: dict[bytes, torch.Tensor] = {}

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """fp32 logits [R, V] over the padded vocabulary, on every TP rank."""
        for copy in plan.copies:
            self.cache.copy(copy.source, copy.target, copy.count)
        for digest in plan.evict:
            del self._features[digest]
        for digest, pixels in plan.encode:
            # One by one, so that an image's features do not depend on the batch.
            self._features[digest] = self.model.encode_images(pixels.unsqueeze(0).to(self.device))[0]
        batch, features = self._build_batch(plan)
        logits = self.model.forward_logits(
            batch, features=features, step=CachedAttentionMetadata(cache=self.cache, spans=plan.spans)
        )
        return self._gather_logits(logits)

    def _build_batch(self, plan: StepPlan) -> tuple[Batch, torch.Tensor | None]:
        device = self.device
        slots, features = torch.zeros(0, dtype=torch.int64, device=device), None
        if plan.image_spans:
            slots = torch.cat([span.slots for span in plan.image_spans]).to(device)
            features = torch.cat([self._features[span.digest][span.rows.to(device)] for span in plan.image_spans])
        given = {
            "token_ids": plan.token_ids.unsqueeze(0).to(device),
            "image_slots": slots,
            "target_rows": plan.logits_positions.to(device),
        }
        return Batch(**{**_EMPTY, **given}), features

    def _gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """All-gather the vocabulary shards over the TP group."""
        if self.mesh.layout.tensor == 1 or not logits.size(0):
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.mesh.layout.tensor)]
        dist.all_gather(parts, logits.contiguous(), group=self.mesh.tp_group)
        return torch.cat(parts, dim=-1)
