"""Blend of data sets: shares, counters, rows and keys, and reading with the loader."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_share4v.config.data import BlendSource
from megatron_share4v.data.loading.collate import StageRole
from megatron_share4v.data.loading.loader import Loader, LoaderOptions
from megatron_share4v.data.sampling.blend import BlendedIndex, open_index, open_sample_reader, source_rows
from megatron_share4v.data.sampling.packing import Packing
from megatron_share4v.data.sampling.sampler import Sampler
from megatron_share4v.data.store.index import Index
from megatron_share4v.errors import DataError
from megatron_share4v.text.template import get_template


@pytest.fixture(scope="module")
def second(prepared, tmp_path_factory) -> Path:
    """Copy of the 24 samples in another directory with another name."""
    return Path(shutil.copytree(prepared.directory, tmp_path_factory.mktemp("blend") / "second"))


def _blend(prepared, second: Path, **shares: tuple[float, float]) -> BlendedIndex:
    [(kind, values)] = shares.items()
    return open_index(
        [BlendSource(path=str(path), **{kind: value}) for path, value in zip((prepared.directory, second), values)]
    )


def _plan(index, **changes: object) -> Sampler:
    settings = {
        "order": "random",
        "group_size": None,
        "seed": 11,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "tokens_per_image": 4,
        "pad_multiple": 8,
    }
    return Sampler(index, **(settings | changes))


def test_rows_keys_and_samples_are_those_of_the_parts(prepared, second, encoder):
    blend = _blend(prepared, second, epochs=(1.0, 2.0))
    assert len(blend) == 48 and [(share.name, share.start, share.count, share.epochs) for share in blend.sources] == [
        ("out", 0, 24, 1.0),
        ("second", 24, 24, 2.0),
    ]
    assert blend.key(3) == f"out:{prepared.index.key(3)}" and blend.key(27) == f"second:{prepared.index.key(3)}"
    assert np.array_equal(blend.rows[24:], prepared.index.rows)
    copy = pickle.loads(pickle.dumps(blend))
    store, alone = open_sample_reader(copy), open_sample_reader(prepared.index)
    assert store.read(27, with_image=True) == alone.read(3, with_image=True)
    store.close()
    alone.close()
    blend.check(tokenizer=encoder.tokenizer, template=get_template("vicuna_v1"), max_text_length=512)
    with pytest.raises(DataError, match="template is plain, prepared with vicuna_v1"):
        blend.check(tokenizer=encoder.tokenizer, template=get_template("plain"), max_text_length=512)


def test_one_directory_is_no_blend(prepared):
    index = open_index(str(prepared.directory))
    assert isinstance(index, Index) and [share.epochs for share in source_rows(index)] == [1.0]


def test_folders_of_one_name_are_told_apart(prepared, tmp_path: Path):
    other = shutil.copytree(prepared.directory, tmp_path / prepared.directory.name)
    blend = _blend(prepared, Path(other), epochs=(1.0, 1.0))
    assert [share.name for share in blend.sources] == [str(prepared.directory), str(other)]


@pytest.mark.parametrize("order", ["sequential", "random", "block", "group_by_modality_length"])
def test_epochs(prepared, second, order: str):
    plan = _plan(_blend(prepared, second, epochs=(2.0, 0.5)), order=order)
    assert plan.epoch_items == 60
    visits = np.zeros(48, dtype=int)
    for epoch in range(4):
        chosen = np.bincount(plan.epoch(epoch), minlength=48)
        assert np.all(chosen[:24] == 2) and chosen[24:].sum() == 12
        visits += chosen
    assert np.all(visits[:24] == 8) and np.all(visits[24:] == 2)
    assert plan.consumed(15) == {"out": 96, "second": 24}
    seen = np.concatenate([plan.global_batch(step).rows for step in range(11)])
    assert plan.consumed(11) == {"out": int((seen < 24).sum()), "second": int((seen >= 24).sum())}


def test_weights(prepared, second):
    """An epoch has as many items as both data sets together, in the ratio 3 to 1."""
    plan = _plan(_blend(prepared, second, weight=(3.0, 1.0)))
    assert plan.epoch_items == 48 and plan.consumed(6) == {"out": 36, "second": 12}
    same = _plan(_blend(prepared, second, weight=(0.75, 0.25)))
    assert np.array_equal(plan.epoch(1), same.epoch(1)) and plan.fingerprint == same.fingerprint
    assert plan.fingerprint != _plan(_blend(prepared, second, weight=(1.0, 1.0))).fingerprint


def test_packs_hold_one_source_each(prepared, second):
    plan = _plan(_blend(prepared, second, epochs=(1.0, 1.5)), packing=Packing(length=160, window=16))
    half = plan.epoch_items
    for epoch in range(2):
        rows, counts = plan.rows_of(plan.epoch(epoch))
        for group in np.split(rows, np.cumsum(counts)[:-1]):
            assert len(set(group >= 24)) == 1
        assert np.all(np.bincount(rows, minlength=48)[:24] == 1) and len(counts) == half
    seen = np.concatenate([plan.global_batch(step).rows for step in range(9)])
    assert plan.consumed(9) == {"out": int((seen < 24).sum()), "second": int((seen >= 24).sum())}


@pytest.mark.parametrize("packing", [None, Packing(length=160)])
def test_the_loader_reads_blends_and_packs(prepared, second, encoder, packing):
    blend = _blend(prepared, second, epochs=(1.0, 1.0))
    plan = _plan(blend, packing=packing)
    settings = dict(role=StageRole(first=True, last=True), data_rank=0, data_size=1)
    loaders = [
        Loader(blend, plan, encoder, options=LoaderOptions(num_workers=workers), **settings) for workers in (0, 2)
    ]
    alone, helped = ([[reading.batch for reading in step] for step in loader.steps(0, 2)] for loader in loaders)
    for number, (step, other) in enumerate(zip(alone, helped, strict=True)):
        items = plan.global_batch(number)
        assert (
            sum(len(batch.targets) for batch in step) == items.trained_tokens
            and sum(len(batch.pixels) for batch in step) == items.images
        )
        for batch, same in zip(step, other, strict=True):
            assert torch.equal(batch.token_ids, same.token_ids) and torch.equal(batch.pixels, same.pixels)
            assert batch.token_ids.shape == (2, items.sequence_length)
            assert batch.segments == same.segments and (batch.segments is None) == (packing is None)
            assert torch.equal(batch.token_ids.flatten()[batch.target_rows + 1], batch.targets)
