"""Model, tokenizer, template and image policy of a checkpoint: turns and an image in, text out.

Everything that shapes a prompt comes from the checkpoint's configuration, never from its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_share4v.checkpoint.assets import open_tokenizer
from megatron_share4v.checkpoint.compatibility import stored_config
from megatron_share4v.checkpoint.hf.auto_import import open_as_checkpoint
from megatron_share4v.checkpoint.manifest import read_manifest
from megatron_share4v.checkpoint.store import load_weights
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.run import Ops, RunConfig
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.loading.prompt import Prompt, make_chat_prompt, make_prompt
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.mcore.backends import select_ops_backend
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_config import DTYPES
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.greedy_reference import greedy_generate
from megatron_share4v.text.template import get_template


@dataclass(frozen=True)
class Question:
    """One conversation that ends with the user's turn. `image` is an encoded file or None."""

    turns: tuple[Turn, ...]
    image: bytes | None
    name: str = "question"


@dataclass(frozen=True)
class Session:
    """A loaded model with its encoder, on every rank of its mesh."""

    config: RunConfig
    mesh: Mesh
    chunks: Sequence[torch.nn.Module]
    encoder: Encoder
    weights: Mapping[str, str]
    """SHA-256 per component, as recorded in the checkpoint's manifest; always of the vision tower."""

    @classmethod
    def open(cls, checkpoint: Path, *, mesh: Mesh, dtype: str | None = None, ops: Ops = "auto") -> Session:
        """Load `checkpoint` (a checkpoint, or a run directory: its newest) at this mesh's layout.

        A model in another format, an export for instance, is imported temporarily. Computes in `dtype` (fp32, bf16) or
        the dtype of the training, with the fused ops available on this machine.

        Raises CheckpointError or ConversionError, DataError when there is no tokenizer, and OpsError when `ops` is
        "native" and none are available.
        """
        implementation = select_ops_backend(ops, mesh=mesh).implementation
        with open_as_checkpoint(Path(checkpoint), mesh=mesh) as path:
            manifest = read_manifest(path)
            config = stored_config(manifest, where=path)
            parallel = ParallelConfig(
                tensor=mesh.layout.tensor, pipeline=mesh.layout.pipeline, virtual=mesh.layout.virtual
            )
            chunks = build_chunks(
                config.model,
                mesh=mesh,
                parallel=parallel,
                dtype=DTYPES[dtype or config.precision.dtype],
                ops=implementation,
            )
            load_weights(path, chunks=chunks)
            tokenizer = open_tokenizer(path, config.data)
            if tokenizer.vocab_size > config.model.language.vocab_size:
                raise DataError(
                    f"tokenizer {tokenizer.path}: has {tokenizer.vocab_size} tokens, the model of {checkpoint} has "
                    f"{config.model.language.vocab_size} ids; use the tokenizer that it was trained with"
                )
            dist.barrier()  # the temporary import may be deleted only when all ranks have read it
        for chunk in chunks:
            chunk.eval()
        images = ImagePolicy.from_config(config.model.vision, config.data)
        template = get_template(config.data.template, config.data.trained_markers)
        length = config.data.max_text_length
        encoder = Encoder(tokenizer=tokenizer, template=template, max_text_length=length, images=images)
        return cls(config=config, mesh=mesh, chunks=chunks, encoder=encoder, weights=manifest.weights)

    def prompt(self, turns: Sequence[Turn], *, images: Sequence[bytes | None]) -> Prompt:
        """Build the prompt of a typed conversation; an <image> in a text is plain text.

        images: an encoded file or None per turn.

        Raises DataError for a bad conversation or image.
        """
        return make_chat_prompt(
            self.encoder, turns, images=images, tokens_per_image=self.config.model.vision.num_features
        )

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """Greedy answers, all questions as one batch.

        Every rank of one model replica calls this with the same questions.
        """
        answers = self.answer_ids(questions, max_new_tokens=max_new_tokens)
        return [self.encoder.tokenizer.decode(ids).strip() for ids in answers]

    def answer_ids(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers as token ids, without the end token: see `answer`."""
        patches = self.config.model.vision.num_features
        prompts = [
            make_prompt(self.encoder, q.turns, image=q.image, tokens_per_image=patches, name=q.name) for q in questions
        ]
        stop, vocabulary = self.encoder.stop_ids, self.encoder.tokenizer.vocab_size
        return greedy_generate(
            self.chunks, prompts, mesh=self.mesh, max_new_tokens=max_new_tokens, stop_ids=stop, vocabulary=vocabulary
        )
