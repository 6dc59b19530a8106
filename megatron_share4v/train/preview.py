"""Preview during training: greedy answers of the model to held-out images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_share4v.data.loading.prompt import Prompt, make_prompt
from megatron_share4v.data.sampling.blend import open_sample_reader
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.model.greedy_reference import greedy_generate
from megatron_share4v.observability.writers import Preview
from megatron_share4v.parallel.collectives import broadcast_object
from megatron_share4v.train.data_feed import Source

CANDIDATES = 16


def generate_preview(
    source: Source, chunks: Sequence[torch.nn.Module], *, mesh: Mesh, samples: int, max_new_tokens: int
) -> Preview | None:
    """Answer the first turn of the first `samples` readable samples with an image; None without any. Collective."""
    # Rank 0 chooses for all ranks: another rank may fail to read a sample that rank 0 can read.
    rows = broadcast_object(_find_readable(source, samples) if mesh.rank == 0 else None)
    if not rows:
        return None
    prompts, references = zip(*(_make_prompt(source, row) for row in rows))
    tokenizer = source.encoder.tokenizer
    answers = greedy_generate(
        chunks,
        prompts,
        mesh=mesh,
        max_new_tokens=max_new_tokens,
        stop_ids=source.encoder.stop_ids,
        vocabulary=tokenizer.vocab_size,
    )
    texts = tuple(tokenizer.decode(ids) for ids in answers)
    return Preview(pixels=prompts[0].pixels[0], answers=texts, references=references)


def _find_readable(source: Source, count: int) -> list[int]:
    """Return the rows of the first `count` readable samples with an image, of CANDIDATES + count candidates."""
    found: list[int] = []
    for row in np.flatnonzero(source.index.rows["n_img"])[: CANDIDATES + count].tolist():
        try:
            _make_prompt(source, row)
        except DataError as error:
            get_logger().warning("preview: %s", error)
        else:
            found.append(row)
        if len(found) == count:
            break
    return found


def _make_prompt(source: Source, row: int) -> tuple[Prompt, str]:
    """Return the prompt of the first turn, and the reference answer of the record."""
    store = open_sample_reader(source.index)
    sample = store.read(row, with_image=True)
    store.close()
    question, answer = sample.turns[:2]
    prompt = make_prompt(
        source.encoder,
        [question],
        image=sample.image,
        tokens_per_image=source.sampler.tokens_per_image,
        name=sample.name,
    )
    return prompt, answer.text
