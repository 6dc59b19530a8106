"""Encoding and collating: image slots, shifted labels, stage roles, and samples that do not fit."""

import dataclasses

import pytest
import torch

from megatron_share4v.data.loading.collate import StageRole, collate
from megatron_share4v.data.records import Example, Sample, Turn
from megatron_share4v.errors import DataError

BOTH = StageRole(first=True, last=True)
IMAGE, IGNORE = -200, -100


def _example(ids: list[int], labels: list[int], *, images: int, key: str = "k") -> Example:
    pixels = torch.full((images, 4, 4, 3), len(ids), dtype=torch.uint8)
    return Example(
        key=key, name=f"s.tar:{key}", input_ids=torch.tensor(ids), labels=torch.tensor(labels), pixels=pixels
    )


WITH_IMAGE = _example([1, 5, IMAGE, 6, 7, 2], [IGNORE, IGNORE, IGNORE, IGNORE, 7, 2], images=1)
CAPTION = _example([1, IMAGE, 8, 13], [IGNORE, IGNORE, 8, 13], images=1)
TEXT = _example([1, 5, 9, 2], [IGNORE, IGNORE, 9, 2], images=0)


def test_mixed_batch():
    batch = collate([TEXT, WITH_IMAGE, CAPTION], sequence_length=10, tokens_per_image=3, role=BOTH)
    assert batch.token_ids.tolist() == [
        [1, 5, 9, 2, 0, 0, 0, 0, 0, 0],
        [1, 5, 0, 0, 0, 6, 7, 2, 0, 0],
        [1, 0, 0, 0, 8, 13, 0, 0, 0, 0],
    ]
    assert batch.image_slots.tolist() == [12, 13, 14, 21, 22, 23]
    assert batch.pixels.shape == (2, 4, 4, 3) and batch.pixels[:, 0, 0, 0].tolist() == [6, 4]
    # Each row predicts the next token; the last image slot predicts the first word of the caption.
    assert batch.target_rows.tolist() == [1, 2, 15, 16, 23, 24]
    assert batch.targets.tolist() == [9, 2, 7, 2, 8, 13]
    flat = batch.token_ids.flatten()
    assert torch.equal(flat[batch.target_rows + 1], batch.targets)


def test_packs():
    """Two sequences: three samples without padding, and one sample with padding."""
    segments = ((4, 8, 6), (6,))
    batch = collate(
        [TEXT, WITH_IMAGE, CAPTION, TEXT], sequence_length=18, tokens_per_image=3, role=BOTH, segments=segments
    )
    assert batch.segments == segments
    assert batch.token_ids.tolist() == [
        [1, 5, 9, 2, 1, 5, 0, 0, 0, 6, 7, 2, 1, 0, 0, 0, 8, 13],
        [1, 5, 9, 2] + [0] * 14,
    ]
    assert batch.image_slots.tolist() == [6, 7, 8, 13, 14, 15] and batch.pixels.shape == (2, 4, 4, 3)
    flat = batch.token_ids.flatten()
    # The last position of a sample does not predict the first token of the next one.
    assert torch.equal(flat[batch.target_rows + 1], batch.targets) and not {3, 11, 17} & set(batch.target_rows.tolist())
    with pytest.raises(DataError, match="s.tar:k: takes 8 positions, more than the 7 that the sampler reserved"):
        collate([TEXT, WITH_IMAGE], sequence_length=18, tokens_per_image=3, role=BOTH, segments=((4, 7),))


def test_batch_without_images():
    batch = collate([TEXT, TEXT], sequence_length=8, tokens_per_image=3, role=BOTH)
    assert batch.pixels.shape == (0, 4, 4, 3) and batch.pixels.dtype == torch.uint8
    assert batch.image_slots.shape == (0,) and batch.image_slots.dtype == torch.int64


def test_roles_fill_their_own_fields():
    blind = dataclasses.replace(WITH_IMAGE, pixels=None)
    first = collate([WITH_IMAGE], sequence_length=8, tokens_per_image=3, role=StageRole(first=True, last=False))
    last = collate([blind], sequence_length=8, tokens_per_image=3, role=StageRole(first=False, last=True))
    both = collate([WITH_IMAGE], sequence_length=8, tokens_per_image=3, role=BOTH)
    assert first.target_rows is None and first.targets is None
    assert last.token_ids is None and last.image_slots is None and last.pixels is None
    assert torch.equal(first.token_ids, both.token_ids) and torch.equal(first.image_slots, both.image_slots)
    assert torch.equal(last.target_rows, both.target_rows) and torch.equal(last.targets, both.targets)


def test_what_does_not_fit_is_named():
    collate([WITH_IMAGE], sequence_length=8, tokens_per_image=3, role=BOTH)
    with pytest.raises(DataError, match="s.tar:k: takes 8 positions, more than the 7 that the sampler reserved"):
        collate([WITH_IMAGE], sequence_length=7, tokens_per_image=3, role=BOTH)
    with pytest.raises(DataError, match="s.tar:k: 1 image placeholders for 0 images"):
        collate([dataclasses.replace(WITH_IMAGE, pixels=TEXT.pixels)], sequence_length=9, tokens_per_image=3, role=BOTH)


def _sample(picture_bytes: bytes | None, *texts: str) -> Sample:
    turns = tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts))
    return Sample(key="k", turns=turns, image=picture_bytes, has_image=picture_bytes is not None, shard="s.tar")


def test_encode_reads_pixels_only_when_asked(encoder, picture):
    sample = _sample(picture(0), "<image>\nwhat is it?", "a red circle")
    seen, blind = (
        encoder.encode(sample, with_pixels=True),
        encoder.encode(dataclasses.replace(sample, image=None), with_pixels=False),
    )
    assert seen.pixels.shape == (1, 28, 28, 3) and blind.pixels is None
    assert torch.equal(seen.input_ids, blind.input_ids) and torch.equal(seen.labels, blind.labels)
    assert seen.input_ids.dtype == seen.labels.dtype == torch.int64
    assert int((seen.input_ids == IMAGE).sum()) == 1


def test_encode_text_only(encoder):
    example = encoder.encode(_sample(None, "what is it?", "a red circle"), with_pixels=True)
    assert example.pixels.shape == (0, 28, 28, 3) and not (example.input_ids == IMAGE).any()


def test_encode_names_shard_and_key(encoder, picture):
    with pytest.raises(DataError, match="s.tar:k: 0 turns have an <image>"):
        encoder.encode(_sample(picture(0), "what is it?", "a red circle"), with_pixels=True)
    with pytest.raises(DataError, match="s.tar:k: 2 turns have an <image>"):
        encoder.encode(_sample(picture(0), "<image>\none", "a", "<image>\ntwo", "b"), with_pixels=True)
    short = dataclasses.replace(encoder, max_text_length=3)
    with pytest.raises(DataError, match="s.tar:k: 0 image placeholders left for 1 images"):
        short.encode(_sample(picture(0), "<image>\nwhat is it?", "a red circle"), with_pixels=True)
    with pytest.raises(DataError, match="s.tar:k: image cannot be read"):
        encoder.encode(_sample(b"not an image", "<image>\nwhat is it?", "a red circle"), with_pixels=True)
