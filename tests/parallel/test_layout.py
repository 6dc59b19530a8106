"""Parallel layout: groups as in megatron-core, inverse rank functions, and error messages."""

from __future__ import annotations

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.layout import AXES, Layout

LAYOUTS = [
    Layout(),
    Layout(tensor=2, data=2, pipeline=2),
    Layout(tensor=2, context=2, data=3, pipeline=2, virtual=2),
    Layout(tensor=4, pipeline=2),
    Layout(data=8),
    Layout(tensor=3, data=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_equal_those_of_megatron_core(layout: Layout) -> None:
    reference = RankGenerator(
        tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, order="tp-cp-ep-dp-pp"
    )
    for axis, token in {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp"}.items():
        assert layout.groups(axis) == sorted(reference.get_ranks(token))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rank_and_coordinates_are_inverse(layout: Layout) -> None:
    coordinates = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(coordinates)) == layout.world_size
    assert [layout.rank(each) for each in coordinates] == list(range(layout.world_size))
    for axis in AXES:
        assert sorted(rank for group in layout.groups(axis) for rank in group) == list(range(layout.world_size))


def test_groups_of_two_by_two_by_two() -> None:
    layout = Layout(tensor=2, data=2, pipeline=2)
    assert layout.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("context") == [[rank] for rank in range(8)]


def test_rank_beyond_the_world_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        Layout(tensor=2).coordinates(2)


def test_data_parallel_size_follows_from_the_world_size() -> None:
    layout = Layout.for_world(ParallelConfig(tensor=2, pipeline=2, virtual=2), world_size=12)
    assert layout == Layout(tensor=2, pipeline=2, virtual=2, data=3)
    assert str(layout) == "tensor 2 x pipeline 2 (virtual 2) x data 3 x context 1"


def test_indivisible_world_size_is_refused() -> None:
    message = r"world size 6 is not a multiple of parallel\.tensor 2 x parallel\.pipeline 2 x parallel\.context 1 = 4"
    with pytest.raises(ConfigError, match=message):
        Layout.for_world(ParallelConfig(tensor=2, pipeline=2), world_size=6)


def test_virtual_stages_are_numbered_across_ranks_first() -> None:
    layout = Layout(pipeline=2, virtual=3)
    assert layout.num_stages == 6
    assert [layout.stage(pipeline_rank=rank, chunk=chunk) for chunk in range(3) for rank in range(2)] == list(range(6))


def test_micro_batches_per_step() -> None:
    assert Layout(data=2).check_micro_batches(global_batch_size=24, micro_batch_size=3) == 4
    with pytest.raises(
        ConfigError, match=r"train\.global_batch_size 20 .* train\.micro_batch_size 3 x data-parallel size 2 = 6"
    ):
        Layout(data=2).check_micro_batches(global_batch_size=20, micro_batch_size=3)
    interleaved = Layout(pipeline=4, virtual=2)
    assert interleaved.check_micro_batches(global_batch_size=8, micro_batch_size=1) == 8
    with pytest.raises(ConfigError, match=r"micro-batches per rank \(6\) to be a multiple of parallel\.pipeline 4"):
        interleaved.check_micro_batches(global_batch_size=6, micro_batch_size=1)
