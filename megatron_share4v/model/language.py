"""The decoder of one pipeline stage: embedding on the first, decoder layers on all, head and loss on the last.

Touvron et al. 2023 (LLaMA) with the variations of LanguageConfig; semantics of Hugging Face's `LlamaForCausalLM`,
`Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `MistralForCausalLM`. A tied head is the embedding's parameter; with pipeline
parallelism the last stage has a copy, whose gradient and the embedding's are added up in each step.

S: positions of a sequence (S / TP on each rank between matrices under sequence parallelism); B: sequences; H: width; T:
positions that reach the head, or new positions of an inference step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from megatron_share4v.config.model import LanguageConfig
from megatron_share4v.mcore.attention import build_attention_metadata
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.kv_cache import CachedAttentionMetadata
from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.mcore.layer_specs import decoder_submodules
from megatron_share4v.mcore.layers import (
    ColumnParallelLinear,
    MegatronModule,
    TransformerBlock,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    mark_tied_copies,
)
from megatron_share4v.ops.linear_cross_entropy import linear_cross_entropy
from megatron_share4v.ops.rope import inverse_frequencies, rope_table


class Head(ColumnParallelLinear):
    """Output head: hidden states to this rank's columns of the logits, or to the summed loss.

    Both are forward passes of the module: its forward hook waits for the weight when updated weights are gathered
    during the forward pass.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor | None = None,
        *,
        targets: torch.Tensor | None = None,
        vocabulary: int = 0,
    ) -> torch.Tensor:
        """[T, H] -> [T, vocab / TP].

        `weight`: the embedding's, for a head without its own. With `targets` [T] -> the sum of -log p(target), without
        all logits in memory.
        """
        if targets is None:
            return super().forward(hidden, weight)[0]
        return linear_cross_entropy(
            hidden,
            weight=self.weight if weight is None else weight,
            targets=targets,
            vocabulary=vocabulary,
            group=self.tp_group,
            implementation=self.config.ops,
        )


class LanguageModel(MegatronModule):
    """The decoder layers of one stage, with the embedding or the head that belong to it."""

    def __init__(
        self,
        config: LayerConfig,
        *,
        language: LanguageConfig,
        mesh: Mesh,
        options: LayerOptions,
        numbers: range,
        first: bool,
        last: bool,
        chunk: int | None,
    ) -> None:
        """Build the decoder layers `numbers`, counted from 0 over the whole model."""
        super().__init__(config)
        self.language = language
        self.mesh = mesh
        tied = language.tie_word_embeddings
        self.head_is_embedding = tied and first and last
        """Whether the head has no weight of its own."""
        self.head_is_copy = tied and last and not first
        """Whether the head's weight is the second copy of the embedding, which counts nowhere."""
        if first:
            self.embedding = VocabParallelEmbedding(
                language.padded_vocab_size,
                language.hidden_size,
                init_method=config.init_method,
                config=config,
                tp_group=mesh.tp_group,
            )
        self.inverse_frequencies = inverse_frequencies(
            language.attention_head_dim, theta=language.rope_theta, scaling=language.rope_scaling
        ).to(mesh.device.torch_device)
        self.decoder = TransformerBlock(
            config,
            decoder_submodules(numbers, config=config, mesh=mesh, options=options),
            pre_process=first,
            post_process=last,
            pg_collection=mesh.groups,
            vp_stage=chunk,
        )
        if last:
            self.head = Head(
                language.hidden_size,
                language.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.head_is_embedding,
                tp_group=mesh.tp_group,
            )
            # Rows are selected from the full sequence before the head, so the head must not gather it again.
            self.head.sequence_parallel = False
            self.head.allreduce_dgrad = mesh.layout.tensor > 1
        if tied and not (first and last):
            mark_tied_copies(
                embedding=self.embedding.weight if first else None, head=self.head.weight if last else None
            )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the entries of this stage; a copy of the embedding is a replica of the embedding's entry."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name = f"{prefix}head.weight"
        if self.head_is_copy:
            entry = sharded[name]
            sharded[name] = replace(entry, key=f"{prefix}embedding.weight", replica_id=(1, *entry.replica_id[1:]))
        return sharded

    def forward(
        self,
        hidden: torch.Tensor | None,
        *,
        segments: tuple[tuple[int, ...], ...] | None = None,
        step: CachedAttentionMetadata | None = None,
    ) -> torch.Tensor:
        """[S, B, H] embeddings (None except on the first stage: input comes from the previous stage) -> [S, B, H].

        `segments` (see Batch): sample lengths of packed sequences; samples attend to themselves only and count
        positions from 0. `step`: hidden [T, 1, H] are the new positions of an inference step, whose earlier ones are in
        the KV cache.
        """
        if step is not None:
            metadata = replace(step, rope_cache=self._rope_cache)
            return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=metadata)
        local_length = (self.decoder.input_tensor if hidden is None else hidden).size(0)
        length = (
            local_length * self.mesh.layout.context * (self.mesh.layout.tensor if self.config.sequence_parallel else 1)
        )
        metadata = build_attention_metadata(self._rope_angles(length), segments=segments, kernel=self.config.attention)
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=metadata)

    @cached_property
    def _rope_cache(self) -> torch.Tensor:
        """Rotary table for inference, whose steps are too short to compute it each time."""
        return rope_table(self._rope_angles(self.language.max_position_embeddings))

    def _rope_angles(self, length: int) -> torch.Tensor:
        """[length, head_dim / 2] angles of whole sequences, also where this CP rank holds a part of their positions."""
        positions = torch.arange(length, dtype=torch.float32, device=self.inverse_frequencies.device)
        return torch.outer(positions, self.inverse_frequencies)

    def _run_head(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        """Run the head, with the embedding's weight where it has none of its own."""
        return self.head(hidden, self.embedding.weight if self.head_is_embedding else None, **options)

    def summed_loss(self, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of -log p(target), an fp32 scalar, over the flat positions `rows` [T] (as in `logits`); targets [T] ids.

        With T = 0 the head still runs, for its collectives. The logits are never in memory at once.
        """
        selected = self._select_rows(hidden, rows)
        return self._run_head(selected, targets=targets, vocabulary=self.language.vocab_size)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute this rank's fp32 logits, [T, vocab / TP], at the flat positions `rows` of `hidden` [S, B, H].

        `rows` [T] are b * S + s. Only these reach the head: in stage 1 about a quarter of all positions have a label.
        """
        return self._mask_padding(self._run_head(self._select_rows(hidden, rows)).float())

    def _select_rows(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Select [T, H] of the flat positions `rows`."""
        if self.config.sequence_parallel:
            # The head's gradient is already summed over the TP group, hence split, not reduce-scattered.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.mesh.tp_group
            )
        length, batch = hidden.shape[:2]
        # `rows` is sequence-major, `hidden` position-major: the indices are converted instead of copying `hidden`.
        return hidden.flatten(0, 1).index_select(0, rows % length * batch + rows // length)

    def _mask_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the logits of rows beyond the vocabulary, which exist for divisibility only, to -inf."""
        columns = logits.size(-1)
        real = self.language.vocab_size - self.mesh.coordinates.tensor * columns
        if real >= columns:
            return logits
        padding = torch.arange(columns, device=logits.device) >= real
        return logits.masked_fill(padding, float("-inf"))
