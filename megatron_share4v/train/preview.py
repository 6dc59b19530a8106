"""A held-out image with the model's own answer, now and then while training: it shows what the loss cannot say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_share4v.data.prompt import make_prompt
from megatron_share4v.data.store import SampleStore
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.model.greedy import greedy_answers
from megatron_share4v.train.feed import Source


@dataclass(frozen=True)
class Preview:
    """pixels: [H, W, 3] uint8, as the tower sees them before normalising."""

    pixels: torch.Tensor
    answer: str


def preview(source: Source, chunks: Sequence[torch.nn.Module], *, mesh: Mesh, max_new_tokens: int) -> Preview | None:
    """The answer to the first turn of the first sample with an image; None when the data set has no image. Every rank calls this."""
    rows = np.flatnonzero(source.index.rows["n_img"])
    if not rows.size:
        return None
    store = SampleStore(source.index)
    sample = store.read(int(rows[0]), with_image=True)
    store.close()
    tokenizer, patches = source.encoder.tokenizer, source.plan.tokens_per_image
    prompt = make_prompt(source.encoder, sample.turns[:1], image=sample.image, tokens_per_image=patches, name=sample.name)
    [ids] = greedy_answers(chunks, [prompt], mesh=mesh, max_new_tokens=max_new_tokens, stop_ids=frozenset({tokenizer.eos_id}))
    return Preview(pixels=prompt.pixels[0], answer=tokenizer.decode(ids))
