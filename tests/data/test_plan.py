"""The plan: what a step trains, how long its sequences are, and that ranks and resuming do not change it."""

from pathlib import Path

import numpy as np
import pytest

from megatron_share4v.data.index import ROW, DatasetInfo, Index
from megatron_share4v.data.plan import ORDERS, Plan
from megatron_share4v.errors import ConfigError, DataError


def _index(count: int) -> Index:
    rows = np.zeros(count, dtype=ROW)
    numbers = np.arange(count)
    rows["n_img"] = numbers % 4 != 1
    rows["n_tok"] = 10 + numbers * 31 % 50
    rows["n_lab"] = 1 + numbers % 9
    rows["words"] = np.where(numbers % 4 != 1, 1, -1) * (3 + numbers * 17 % 40)
    info = DatasetInfo(
        samples=count, shards=(), index_sha256="0" * 64, keys_sha256="", tokenizer_fingerprint="", template="", max_text_length=64, sources={}
    )
    return Index(directory=Path("synthetic"), rows=rows, keys=np.array([f"k{n}" for n in numbers], dtype=np.bytes_), info=info)


def _plan(index: Index, **changes: object) -> Plan:
    settings = {
        "order": "random", "group_size": None, "seed": 5, "global_batch_size": 8, "micro_batch_size": 2, "tokens_per_image": 16, "pad_multiple": 8,
    }  # fmt: skip
    return Plan(index, **(settings | changes))


@pytest.mark.parametrize("order", ORDERS)
def test_steps_run_through_epochs_without_a_gap(order: str):
    plan = _plan(_index(30), order=order)
    items = np.concatenate([plan.step(k).rows for k in range(15)])
    for epoch in range(4):
        assert np.array_equal(items[30 * epoch : 30 * (epoch + 1)], plan.epoch(epoch))
        assert np.array_equal(np.sort(plan.epoch(epoch)), np.arange(30))


@pytest.mark.parametrize("order", ORDERS)
def test_any_step_can_be_the_first(order: str):
    index = _index(30)
    running = _plan(index, order=order)
    for step in range(12):
        expected = running.step(step)
        fresh = _plan(index, order=order).step(step)
        assert np.array_equal(fresh.rows, expected.rows) and fresh.sequence_length == expected.sequence_length


def test_data_set_smaller_than_a_batch():
    assert _plan(_index(3), order="sequential").step(1).rows.tolist() == [2, 0, 1, 2, 0, 1, 2, 0]


def test_step_counts_positions_images_and_labels():
    index = _index(30)
    items = _plan(index).step(2)
    entries = index.rows[items.rows]
    positions = entries["n_tok"] + entries["n_img"].astype(int) * 15
    assert items.tokens == positions.sum()
    assert items.images == entries["n_img"].sum()
    assert items.trained_tokens == entries["n_lab"].sum()
    assert items.sequence_length % 8 == 0 and 0 <= items.sequence_length - positions.max() < 8


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_micro_batches_do_not_depend_on_data_parallel_size(data_size: int):
    plan = _plan(_index(30))
    items = plan.step(1)
    slots = {}
    for rank in range(data_size):
        for position, rows in enumerate(plan.micro_batches(items, data_rank=rank, data_size=data_size)):
            slots[rank + position * data_size] = rows
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
    with pytest.raises(ConfigError, match="4 micro-batches of 2, which 3 data-parallel ranks cannot share evenly; use a multiple of 6"):
        plan.micro_batches(plan.step(0), data_rank=0, data_size=3)
    with pytest.raises(DataError, match="no samples"):
        _plan(_index(0))


def test_fingerprint_covers_what_decides_the_sequence():
    index = _index(30)
    base = _plan(index).fingerprint
    assert base == _plan(index, global_batch_size=4, micro_batch_size=1, pad_multiple=64).fingerprint
    assert len({base, _plan(index, seed=6).fingerprint, _plan(index, order="sequential").fingerprint}) == 3
    grouped = [_plan(index, order="group_by_modality_length", group_size=size).fingerprint for size in (8, 16)]
    assert grouped[0] != grouped[1]
