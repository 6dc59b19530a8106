"""Batches of a rank: the same content for any number of workers, ranks and any start; damage arrives as itself; nothing hangs."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_share4v.data.collate import Role
from megatron_share4v.data.index import Index
from megatron_share4v.data.loader import batches
from megatron_share4v.data.plan import Plan
from megatron_share4v.data.sample import Batch
from megatron_share4v.errors import ConfigError, DataError

BOTH = Role(first=True, last=True)
TOKENS_PER_IMAGE = 4


def _plan(index: Index, **changes: object) -> Plan:
    settings = {
        "order": "group_by_modality_length", "group_size": None, "seed": 11, "global_batch_size": 8, "micro_batch_size": 2,
        "tokens_per_image": TOKENS_PER_IMAGE, "pad_multiple": 8,
    }  # fmt: skip
    return Plan(index, **(settings | changes))


def _read(index: Index, encoder, *, plan: Plan | None = None, **changes: object) -> list[list[Batch]]:
    settings = {"role": BOTH, "start_step": 0, "stop_step": 4, "data_rank": 0, "data_size": 1, "num_workers": 0, "prefetch": 2}
    return list(batches(index, plan or _plan(index), encoder, **(settings | changes)))


def _same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("token_ids", "image_slots", "pixels", "target_rows", "targets"))


@pytest.fixture(scope="module")
def one_rank(prepared, encoder) -> list[list[Batch]]:
    return _read(prepared.index, encoder)


def test_steps_agree_with_the_plan(prepared, one_rank):
    plan = _plan(prepared.index)
    assert [len(step) for step in one_rank] == [4] * 4
    for number, step in enumerate(one_rank):
        items = plan.step(number)
        assert all(batch.token_ids.shape == (2, items.sequence_length) for batch in step)
        assert sum(len(batch.targets) for batch in step) == items.trained_tokens
        assert sum(len(batch.pixels) for batch in step) == items.images
        for batch in step:
            assert len(batch.image_slots) == len(batch.pixels) * TOKENS_PER_IMAGE
            assert torch.equal(batch.token_ids.flatten()[batch.target_rows + 1], batch.targets)


@pytest.mark.parametrize("data_size", [2, 4])
def test_data_parallel_ranks_share_the_same_micro_batches(prepared, encoder, one_rank, data_size: int):
    ranks = [_read(prepared.index, encoder, data_rank=rank, data_size=data_size) for rank in range(data_size)]
    for number, step in enumerate(one_rank):
        for slot, batch in enumerate(step):
            assert _same(batch, ranks[slot % data_size][number][slot // data_size])


def test_workers_do_not_change_the_batches(prepared, encoder, one_rank):
    state = torch.get_rng_state()
    two_workers = _read(prepared.index, encoder, num_workers=2)
    assert torch.equal(state, torch.get_rng_state()), "reading must not draw from the global generator"
    assert all(_same(a, b) for left, right in zip(one_rank, two_workers, strict=True) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_reading_can_start_at_any_step(prepared, encoder, one_rank, start: int):
    resumed = _read(prepared.index, encoder, start_step=start)
    assert len(resumed) == 4 - start
    assert all(_same(a, b) for left, right in zip(one_rank[start:], resumed) for a, b in zip(left, right))


def test_each_stage_reads_what_it_needs(prepared, encoder, one_rank, tmp_path: Path):
    """The last stage must not touch image bytes: it reads a copy in which they are all destroyed."""
    directory = Path(shutil.copytree(prepared.directory, tmp_path / "blind"))
    for entry in prepared.index.rows:
        with (directory / f"shard-{entry['shard']:06d}.tar").open("r+b") as shard:
            shard.seek(int(entry["image_offset"]))
            shard.write(bytes(int(entry["image_length"])))
    last = _read(Index.open(directory), encoder, role=Role(first=False, last=True))
    first = _read(prepared.index, encoder, role=Role(first=True, last=False))
    middle = _read(prepared.index, encoder, role=Role(first=False, last=False))
    for number, step in enumerate(one_rank):
        for slot, whole in enumerate(step):
            assert torch.equal(last[number][slot].targets, whole.targets) and torch.equal(last[number][slot].target_rows, whole.target_rows)
            assert last[number][slot].pixels is None and last[number][slot].token_ids is None
            assert torch.equal(first[number][slot].pixels, whole.pixels) and first[number][slot].targets is None
            assert middle[number][slot] == Batch(None, None, None, None, None)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_arrives_as_a_data_error_when_its_step_is_reached(prepared, encoder, one_rank, tmp_path: Path, num_workers: int):
    directory = Path(shutil.copytree(prepared.directory, tmp_path / "damaged"))
    index = Index.open(directory)
    plan = _plan(index, order="sequential")
    entry = index.rows[9]
    with (directory / f"shard-{entry['shard']:06d}.tar").open("r+b") as shard:
        shard.seek(int(entry["image_offset"]) + 9)
        shard.write(b"\0\0\0")
    stream = batches(
        index, plan, encoder, role=BOTH, start_step=0, stop_step=3, data_rank=0, data_size=1, num_workers=num_workers, prefetch=2
    )
    assert len(next(stream)) == 4
    with pytest.raises(DataError) as error:
        next(stream)
    assert type(error.value) is DataError
    assert str(error.value).startswith("shard-000001.tar:img_9: crc32 is") and "Traceback" not in str(error.value)


def test_ranks_that_cannot_share_are_refused(prepared, encoder):
    for role in (BOTH, Role(first=False, last=False)):
        with pytest.raises(ConfigError, match="3 data-parallel ranks cannot share evenly"):
            _read(prepared.index, encoder, role=role, data_size=3)


SCRIPT = """
    import sys
    from megatron_share4v.data.collate import Role
    from megatron_share4v.data.encode import Encoder
    from megatron_share4v.data.image import ImagePolicy
    from megatron_share4v.data.index import Index
    from megatron_share4v.data.loader import batches
    from megatron_share4v.data.plan import Plan
    from megatron_share4v.text.template import get_template
    from megatron_share4v.text.tokenizer import Tokenizer

    if __name__ == "__main__":
        index = Index.open(sys.argv[1])
        plan = Plan(index, order="random", group_size=None, seed=0, global_batch_size=4, micro_batch_size=2, tokens_per_image=4, pad_multiple=8)
        encoder = Encoder(Tokenizer(sys.argv[2]), get_template("vicuna_v1"), 512, ImagePolicy(28))
        stream = batches(
            index, plan, encoder, role=Role(True, True), start_step=0, stop_step=10**6, data_rank=0, data_size=1, num_workers=2, prefetch=4
        )
        next(stream)
        print("got one", flush=True)
        raise SystemExit(3)
"""


def test_workers_do_not_hold_up_the_exit(prepared, tmp_path: Path):
    script = tmp_path / "stops_early.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script), str(prepared.directory), str(prepared.tokenizer_path)], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (3, "got one\n"), result.stderr
    assert "Traceback" not in result.stderr
