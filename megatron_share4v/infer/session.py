"""A conversation with a checkpoint: turns and an image in, text out. Joins the model with its tokenizer, template and image policy.

Everything that shapes a prompt comes from the configuration that the checkpoint carries, never from its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_share4v.checkpoint.companions import tokenizer_of
from megatron_share4v.checkpoint.handover import config_of
from megatron_share4v.checkpoint.store import load_weights, locate
from megatron_share4v.checkpoint.manifest import read_manifest
from megatron_share4v.config.run import Ops, ParallelConfig, RunConfig
from megatron_share4v.data.encode import Encoder
from megatron_share4v.data.image import ImagePolicy
from megatron_share4v.data.prompt import make_prompt
from megatron_share4v.data.sample import Turn
from megatron_share4v.mcore.choice import agree_on_ops
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.transformer import DTYPES
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.greedy import greedy_answers
from megatron_share4v.text.template import get_template
from megatron_share4v.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """One open conversation; it ends with the human's turn. `image` is an encoded file or None."""

    turns: tuple[Turn, ...]
    image: bytes | None
    name: str = "question"


@dataclass(frozen=True)
class Session:
    """A model that answers, on every rank of its mesh."""

    config: RunConfig
    mesh: Mesh
    chunks: Sequence[torch.nn.Module]
    encoder: Encoder

    @classmethod
    def open(cls, checkpoint: Path, *, mesh: Mesh, dtype: str | None = None, ops: Ops = "auto") -> Session:
        """The model of `checkpoint` (a checkpoint, or a run directory: its newest) at this mesh's layout, whatever it was trained at.

        It computes in `dtype` (fp32, bf16), or in that of its training, with the fused ops that this machine has, whatever it was trained with.

        Raises CheckpointError, DataError when it has no tokenizer of its own and the file that its configuration names is gone, and OpsError
        when `ops` is "native" and there are none.
        """
        path = locate(checkpoint)
        config = config_of(read_manifest(path), where=path)
        parallel = ParallelConfig(tensor=mesh.layout.tensor, pipeline=mesh.layout.pipeline, virtual=mesh.layout.virtual)
        implementation = agree_on_ops(ops, mesh=mesh).implementation
        chunks = build_chunks(config.model, mesh=mesh, parallel=parallel, dtype=DTYPES[dtype or config.precision.dtype], ops=implementation)
        load_weights(path, chunks=chunks, mesh=mesh)
        for chunk in chunks:
            chunk.eval()
        data = config.data
        encoder = Encoder(
            tokenizer=Tokenizer(tokenizer_of(path, data)),
            template=get_template(data.template),
            max_text_length=data.max_text_length,
            images=ImagePolicy(image_size=config.model.vision.image_size, aspect_ratio=data.image_aspect_ratio),
        )
        return cls(config=config, mesh=mesh, chunks=chunks, encoder=encoder)

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """Greedy answers, all questions as one batch. Every rank of one model replica calls this with the same questions."""
        answers = self.answer_ids(questions, max_new_tokens=max_new_tokens)
        return [self.encoder.tokenizer.decode(ids).strip() for ids in answers]

    def answer_ids(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[list[int]]:
        """The same answers as ids, without the end token."""
        patches, tokenizer = self.config.model.vision.num_patches, self.encoder.tokenizer
        prompts = [make_prompt(self.encoder, q.turns, image=q.image, tokens_per_image=patches, name=q.name) for q in questions]
        stop, vocabulary = frozenset({tokenizer.eos_id}), tokenizer.vocab_size
        return greedy_answers(self.chunks, prompts, mesh=self.mesh, max_new_tokens=max_new_tokens, stop_ids=stop, vocabulary=vocabulary)
