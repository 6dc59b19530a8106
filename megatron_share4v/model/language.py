"""The LLaMA decoder of one pipeline stage: embedding on the first, decoder layers everywhere, head and loss on the last.

S positions, B sequences, H width; under sequence parallelism each tensor rank holds S / tensor positions between its matrices.
Touvron et al. 2023 (LLaMA); Hugging Face `LlamaForCausalLM` semantics.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

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
    RotaryEmbedding,
    TransformerBlock,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron_share4v.model.loss import summed_cross_entropy
from megatron_share4v.ops.linear_cross_entropy import linear_cross_entropy
from megatron_share4v.ops.rope import rope_table


class Head(ColumnParallelLinear):
    """Hidden states to this rank's columns of the logits, or straight to the summed loss. Both by a call of the module, which is what waits for
    its weight where updated weights are gathered while the forward pass runs."""

    def forward(
        self, hidden: torch.Tensor, *, targets: torch.Tensor | None = None, vocabulary: int = 0
    ) -> torch.Tensor:
        """[T, H] -> [T, vocab / tensor]; with `targets` [T] -> the sum of -log p(target), with native ops, and no logits in memory."""
        if targets is None:
            return super().forward(hidden)[0]
        return linear_cross_entropy(
            hidden,
            weight=self.weight,
            targets=targets,
            vocabulary=vocabulary,
            group=self.tp_group,
            implementation="native",
        )


class LanguageModel(MegatronModule):
    """The decoder layers of one stage, with the ends that belong to it."""

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
        """`numbers`: the decoder layers of this stage, counted from 0."""
        super().__init__(config)
        self.language = language
        self.mesh = mesh
        if first:
            self.embedding = VocabParallelEmbedding(
                language.padded_vocab_size,
                language.hidden_size,
                init_method=config.init_method,
                config=config,
                tp_group=mesh.tp_group,
            )
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=language.rope_theta,
            use_cpu_initialization=mesh.device.kind == "cpu",
        )
        self.decoder = TransformerBlock(
            config,
            decoder_submodules(numbers, layers=language.num_layers, mesh=mesh, options=options),
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
                tp_group=mesh.tp_group,
            )
            # Rows are picked from the full sequence before the head, so the head itself must not gather it again.
            self.head.sequence_parallel = False
            self.head.allreduce_dgrad = mesh.layout.tensor > 1

    def forward(
        self,
        hidden: torch.Tensor | None,
        *,
        segments: tuple[tuple[int, ...], ...] | None = None,
        step: CachedAttentionMetadata | None = None,
    ) -> torch.Tensor:
        """[S, B, H] embeddings (first stage; None elsewhere: the input comes from the previous stage) -> [S, B, H].

        `segments` (see Batch): where the samples of packed sequences end; each sees itself alone and counts its positions from 0.
        `step`: hidden [T, 1, H] are the new positions of a generation step, whose earlier ones are in the cache.
        """
        if step is not None:
            metadata = replace(step, rope_cache=self._table)
            return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=metadata)
        held = (self.decoder.input_tensor if hidden is None else hidden).size(0)
        length = held * self.mesh.layout.context * (self.mesh.layout.tensor if self.config.sequence_parallel else 1)
        metadata = build_attention_metadata(self._angles(length), segments=segments, kernel=self.config.attention)
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=metadata)

    @cached_property
    def _table(self) -> torch.Tensor:
        """For generation, whose steps are too short to make it anew."""
        return rope_table(self._angles(self.language.max_position_embeddings))

    def _angles(self, length: int) -> torch.Tensor:
        """[length, head_dim / 2]: of whole sequences, also where this rank holds a part of their positions."""
        return self.rotary.get_freqs_non_repeated(length)

    def summed_loss(self, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of -log p(target), an fp32 scalar, over the flat positions `rows` [T] (as in `logits`); targets [T] ids.

        Without any the head still runs, for the sake of its collectives. With native ops the logits are never in memory together.
        """
        if self.config.ops == "native":
            return self.head(self._picked(hidden, rows), targets=targets, vocabulary=self.language.vocab_size)
        if rows.numel() == 0:
            blank = torch.zeros(1, dtype=torch.int64, device=hidden.device)
            return 0.0 * summed_cross_entropy(self.logits(hidden, blank), blank)
        return summed_cross_entropy(self.logits(hidden, rows), targets)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the fp32 logits, [T, vocab / tensor], of the flat positions `rows` ([T], b * S + s) of `hidden` [S, B, H].

        Only rows that matter reach the head: in stage 1 about a quarter of all positions carry a label.
        """
        return self._without_padding(self.head(self._picked(hidden, rows)).float())

    def _picked(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[T, H]."""
        if self.config.sequence_parallel:
            # The head's gradient is already summed over the tensor group, hence split, not reduce-scattered.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.mesh.tp_group
            )
        length, batch = hidden.shape[:2]
        # Positions are counted sequence by sequence, `hidden` is not: no copy of it is made to pick from.
        return hidden.flatten(0, 1).index_select(0, rows % length * batch + rows // length)

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Rows of the head beyond the vocabulary exist for divisibility alone and must not take probability."""
        columns = logits.size(-1)
        real = self.language.vocab_size - self.mesh.coordinates.tensor * columns
        if real >= columns:
            return logits
        padding = torch.arange(columns, device=logits.device) >= real
        return logits.masked_fill(padding, float("-inf"))
