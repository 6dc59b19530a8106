"""Sampler: rows and sequence length of each step, independent of the number of ranks and of resuming."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megatron_share4v.data.sampling.blend import BlendedIndex, BlendMember
from megatron_share4v.data.sampling.packing import Packing
from megatron_share4v.data.sampling.sampler import ORDERS, BlockShuffle, Sampler
from megatron_share4v.data.store.index import ROW, DatasetInfo, Index
from megatron_share4v.errors import ConfigError, DataError


def _index(count: int) -> Index:
    rows = np.zeros(count, dtype=ROW)
    numbers = np.arange(count)
    rows["n_img"] = numbers % 4 != 1
    rows["n_tok"] = 10 + numbers * 31 % 50
    rows["n_lab"] = 1 + numbers % 9
    rows["words"] = np.where(numbers % 4 != 1, 1, -1) * (3 + numbers * 17 % 40)
    info = DatasetInfo(
        samples=count,
        shards=(),
        index_sha256="0" * 64,
        keys_sha256="",
        tokenizer_fingerprint="",
        template="",
        max_text_length=64,
        sources={},
    )
    return Index(
        directory=Path("synthetic"), rows=rows, keys=np.array([f"k{n}" for n in numbers], dtype=np.bytes_), info=info
    )


def _plan(index: Index, **changes: object) -> Sampler:
    settings = {
        "order": "random",
        "group_size": None,
        "seed": 5,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "tokens_per_image": 16,
        "pad_multiple": 8,
    }
    return Sampler(index, **(settings | changes))


@pytest.mark.parametrize("order", ORDERS)
def test_steps_run_through_epochs_without_a_gap(order: str):
    plan = _plan(_index(30), order=order)
    items = np.concatenate([plan.global_batch(k).rows for k in range(15)])
    for epoch in range(4):
        assert np.array_equal(items[30 * epoch : 30 * (epoch + 1)], plan.epoch(epoch))
        assert np.array_equal(np.sort(plan.epoch(epoch)), np.arange(30))


@pytest.mark.parametrize("order", ORDERS)
def test_any_step_can_be_the_first(order: str):
    index = _index(30)
    running = _plan(index, order=order)
    for step in range(12):
        expected = running.global_batch(step)
        fresh = _plan(index, order=order).global_batch(step)
        assert np.array_equal(fresh.rows, expected.rows) and fresh.sequence_length == expected.sequence_length


def test_data_set_smaller_than_a_batch():
    assert _plan(_index(3), order="sequential").global_batch(1).rows.tolist() == [2, 0, 1, 2, 0, 1, 2, 0]


def test_step_counts_positions_images_and_labels():
    index = _index(30)
    items = _plan(index).global_batch(2)
    entries = index.rows[items.rows]
    positions = entries["n_tok"] + entries["n_img"].astype(int) * 15
    assert items.tokens == positions.sum()
    assert items.images == entries["n_img"].sum()
    assert items.trained_tokens == entries["n_lab"].sum()
    assert items.sequence_length % 8 == 0 and 0 <= items.sequence_length - positions.max() < 8


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_micro_batches_do_not_depend_on_data_parallel_size(data_size: int):
    plan = _plan(_index(30))
    items = plan.global_batch(1)
    slots = {}
    for rank in range(data_size):
        for position, micro_batch in enumerate(plan.micro_batches(items, data_rank=rank, data_size=data_size)):
            assert (micro_batch.sequence_length, micro_batch.segments) == (items.sequence_length, None)
            slots[rank + position * data_size] = micro_batch.rows
    assert np.array_equal(np.concatenate([slots[slot] for slot in range(4)]), items.rows)


def test_sizes_that_do_not_divide_are_refused():
    index = _index(30)
    with pytest.raises(ConfigError, match="global_batch_size 8 is not a multiple of train.micro_batch_size 3"):
        _plan(index, micro_batch_size=3)
    with pytest.raises(ConfigError, match="group_size 5 is not a multiple"):
        _plan(index, group_size=5)
    with pytest.raises(ConfigError, match="data.order 'shuffled'"):
        _plan(index, order="shuffled")
    plan = _plan(index)
    with pytest.raises(
        ConfigError, match="4 micro-batches of 2, which do not divide by 3 data-parallel ranks; use a multiple of 6"
    ):
        plan.micro_batches(plan.global_batch(0), data_rank=0, data_size=3)
    with pytest.raises(DataError, match="no samples"):
        _plan(_index(0))


def test_fingerprint_covers_what_decides_the_sequence():
    index = _index(30)
    base = _plan(index).fingerprint
    assert base == _plan(index, global_batch_size=4, micro_batch_size=1, pad_multiple=64).fingerprint
    others = [
        {"seed": 6},
        {"order": "sequential"},
        {"packing": PACKING},
        {"packing": Packing(97, 40)},
        {"order": "block"},
    ]
    others.append({"order": "block", "blocks": BlockShuffle(size=8)})
    assert len({base, *(_plan(index, **change).fingerprint for change in others)}) == 7
    grouped = [_plan(index, order="group_by_modality_length", group_size=size).fingerprint for size in (8, 16)]
    assert grouped[0] != grouped[1]


PACKING = Packing(length=96, window=40)


@pytest.mark.parametrize("order", ["sequential", "random", "block"])
def test_packs_hold_every_sample_once_and_none_too_long(order: str):
    index = _index(150)
    plan = _plan(index, order=order, packing=PACKING, global_batch_size=4)
    for epoch in range(3):
        rows, counts = plan.rows_of(plan.epoch(epoch))
        assert np.array_equal(np.sort(rows), np.arange(150)) and counts.sum() == 150
        assert len(counts) == plan.epoch_items
    items = plan.global_batch(3)
    assert (
        items.sequence_length == 96
        and items.sequences == 4 == len(items.counts)
        and len(items.rows) == items.counts.sum() == len(items.lengths)
    )
    micro_batches = plan.micro_batches(items, data_rank=0, data_size=1)
    assert np.array_equal(np.concatenate([micro_batch.rows for micro_batch in micro_batches]), items.rows)
    for micro_batch in micro_batches:
        assert len(micro_batch.segments) == 2 and all(sum(lengths) <= 96 for lengths in micro_batch.segments)
        assert sum(len(lengths) for lengths in micro_batch.segments) == len(micro_batch.rows)
    assert items.tokens == sum(sum(lengths) for micro_batch in micro_batches for lengths in micro_batch.segments)
    shared = [plan.micro_batches(items, data_rank=rank, data_size=2) for rank in range(2)]
    assert [shared[slot % 2][slot // 2] for slot in range(2)] == micro_batches
    assert 0.8 < plan.fill <= 1.0


def test_a_sample_longer_than_a_pack_is_named():
    with pytest.raises(DataError, match="sample k.* takes 74 positions, more than data.pack_length 64"):
        _plan(_index(150), packing=Packing(length=64))
    with pytest.raises(ConfigError, match="group_by_modality_length"):
        _plan(_index(150), packing=PACKING, order="group_by_modality_length")


def test_consumed_counts_samples():
    index = _index(30)
    assert _plan(index).consumed(7) == {"synthetic": 56}
    packed = _plan(index, packing=PACKING, global_batch_size=4)
    seen = 0
    for step in range(20):
        assert packed.consumed(step) == {"synthetic": seen}
        seen += len(packed.global_batch(step).rows)


GOLDEN = {
    "sequential": "81b93f3f32cd2f39",
    "random": "ce7e96277e34c905",
    "block": "1219ce1ae76f7cf4",
    "group_by_modality_length": "24980fcefe60ffa1",
    "packed random": "ed17c76970aa7c11",
    "packed block": "1f0703713d4eaf3b",
    "blend random": "4a12f0ba2947419e",
    "blend packed random": "90107d2bd03aa9f3",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_plans(name: str):
    """First steps of each order, across an epoch boundary: if this fails, old runs can no longer be resumed."""
    order = name.split()[-1]
    index = (
        BlendedIndex([BlendMember("a", _index(200), 1.0), BlendMember("b", _index(100), 1.7)])
        if "blend" in name
        else _index(300)
    )
    plan = _plan(
        index, order=order, blocks=BlockShuffle(size=8, window=4), packing=PACKING if "packed" in name else None
    )
    digest = hashlib.sha256()
    for step in range(45):
        items = plan.global_batch(step)
        digest.update(items.rows.astype("<i8").tobytes() + items.lengths.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("packing", [None, PACKING])
@pytest.mark.parametrize("order", ["random", "block"])
def test_a_run_that_changes_its_data_parallel_size_sees_the_same_samples(order: str, packing: Packing | None):
    """Sixty steps at data 2, resumed with a new sampler at data 1, then at data 4."""
    index = _index(300)
    undisturbed = _plan(index, order=order, packing=packing)
    steps = np.random.RandomState(0).choice(np.arange(1, 60), 2, replace=False)
    seen = []
    for first, last, size in zip((0, *sorted(steps)), (*sorted(steps), 60), (2, 1, 4)):
        plan = _plan(index, order=order, packing=packing)
        for step in range(first, last):
            ranks = [
                plan.micro_batches(plan.global_batch(step), data_rank=rank, data_size=size) for rank in range(size)
            ]
            seen.append([ranks[slot % size][slot // size] for slot in range(4)])
    for step, micro_batches in enumerate(seen):
        assert micro_batches == undisturbed.micro_batches(undisturbed.global_batch(step), data_rank=0, data_size=1)


def test_micro_batches_may_have_lengths_of_their_own():
    index = _index(30)
    same, own = _plan(index), _plan(index, pad_to="micro_batch")
    assert own.fingerprint == same.fingerprint
    for step in range(6):
        a, b = same.global_batch(step), own.global_batch(step)
        assert (
            np.array_equal(a.rows, b.rows)
            and a.sequence_length == b.sequence_length
            and a.positions == 8 * a.sequence_length
        )
        batches = [batch for rank in range(2) for batch in own.micro_batches(b, data_rank=rank, data_size=2)]
        lengths = dict(zip(b.rows.tolist(), b.lengths.tolist()))
        for batch in batches:
            longest = max(lengths[row] for row in batch.rows)
            assert longest <= batch.sequence_length < longest + 8 and batch.sequence_length % 8 == 0
        assert (
            b.positions == sum(2 * batch.sequence_length for batch in batches) < a.positions
            and (b.padded >= b.lengths).all()
        )
        assert max(batch.sequence_length for batch in batches) == b.sequence_length
    packed = _plan(index, pad_to="micro_batch", packing=Packing(length=128, window=64)).global_batch(0)
    assert packed.positions == 8 * 128
