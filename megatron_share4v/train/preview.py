"""A held-out image with the model's own answer, now and then while training: it shows what the loss cannot say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_share4v.data.blend import open_store
from megatron_share4v.data.prompt import Prompt, make_prompt
from megatron_share4v.errors import DataError
from megatron_share4v.log import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.model.greedy import greedy_answers
from megatron_share4v.train.feed import Source

CANDIDATES = 16


@dataclass(frozen=True)
class Preview:
    """pixels: [H, W, 3] uint8, as the tower sees them before normalising."""

    pixels: torch.Tensor
    answer: str


def preview(source: Source, chunks: Sequence[torch.nn.Module], *, mesh: Mesh, max_new_tokens: int) -> Preview | None:
    """The answer to the first turn of the first readable sample with an image; None when there is none. Every rank calls this."""
    row = _first_readable(source) if mesh.rank == 0 else None
    # One rank chooses for all: what it can read, another may fail to.
    dist.broadcast_object_list(chosen := [row], src=0)
    if chosen[0] is None:
        return None
    prompt = _prompt(source, chosen[0])
    tokenizer = source.encoder.tokenizer
    [ids] = greedy_answers(
        chunks, [prompt], mesh=mesh, max_new_tokens=max_new_tokens, stop_ids=frozenset({tokenizer.eos_id}), vocabulary=tokenizer.vocab_size
    )
    return Preview(pixels=prompt.pixels[0], answer=tokenizer.decode(ids))


def _first_readable(source: Source) -> int | None:
    """Row of the first sample with an image, among a few, that can be read."""
    for row in np.flatnonzero(source.index.rows["n_img"])[:CANDIDATES].tolist():
        try:
            _prompt(source, row)
        except DataError as error:
            get_logger().warning("preview: %s", error)
        else:
            return row
    return None


def _prompt(source: Source, row: int) -> Prompt:
    store = open_store(source.index)
    sample = store.read(row, with_image=True)
    store.close()
    return make_prompt(source.encoder, sample.turns[:1], image=sample.image, tokens_per_image=source.plan.tokens_per_image, name=sample.name)
