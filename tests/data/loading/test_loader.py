"""Loader batches: equal for any number of workers and ranks and any start; damaged data is reported; no hangs."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_share4v.data.images.pixels import mean_colour_images
from megatron_share4v.data.loading.collate import StageRole
from megatron_share4v.data.loading.loader import ImageSharding, Loader, LoaderOptions
from megatron_share4v.data.records import Batch
from megatron_share4v.data.sampling.sampler import Sampler
from megatron_share4v.data.store.index import Index
from megatron_share4v.errors import ConfigError

BOTH = StageRole(first=True, last=True)
TOKENS_PER_IMAGE = 4


def _plan(index: Index, **changes: object) -> Sampler:
    settings = {
        "order": "group_by_modality_length",
        "group_size": None,
        "seed": 11,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "tokens_per_image": TOKENS_PER_IMAGE,
        "pad_multiple": 8,
    }
    return Sampler(index, **(settings | changes))


def _read(index: Index, encoder, *, plan: Sampler | None = None, **changes: object) -> list[list[Batch]]:
    settings = {
        "role": BOTH,
        "start_step": 0,
        "stop_step": 4,
        "data_rank": 0,
        "data_size": 1,
        "num_workers": 0,
    } | changes
    start, stop, options = (settings.pop(name) for name in ("start_step", "stop_step", "num_workers"))
    loader = Loader(index, plan or _plan(index), encoder, options=LoaderOptions(num_workers=options), **settings)
    steps = list(loader.steps(start, stop))
    assert not any(reading.faults for step in steps for reading in step)
    return [[reading.batch for reading in step] for step in steps]


def _same(left: Batch, right: Batch) -> bool:
    return all(
        torch.equal(getattr(left, name), getattr(right, name))
        for name in ("token_ids", "image_slots", "pixels", "target_rows", "targets")
    )


@pytest.fixture(scope="module")
def one_rank(prepared, encoder) -> list[list[Batch]]:
    return _read(prepared.index, encoder)


def test_steps_agree_with_the_plan(prepared, one_rank):
    plan = _plan(prepared.index)
    assert [len(step) for step in one_rank] == [4] * 4
    for number, step in enumerate(one_rank):
        items = plan.global_batch(number)
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
    assert all(
        _same(a, b) for left, right in zip(one_rank, two_workers, strict=True) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("start", [1, 2, 3])
def test_reading_can_start_at_any_step(prepared, encoder, one_rank, start: int):
    resumed = _read(prepared.index, encoder, start_step=start)
    assert len(resumed) == 4 - start
    assert all(_same(a, b) for left, right in zip(one_rank[start:], resumed) for a, b in zip(left, right))


def test_each_stage_reads_what_it_needs(prepared, encoder, one_rank, tmp_path: Path):
    """The last stage must not read image bytes: it reads a copy in which they are destroyed."""
    directory = Path(shutil.copytree(prepared.directory, tmp_path / "blind"))
    for entry in prepared.index.rows:
        with (directory / f"shard-{entry['shard']:06d}.tar").open("r+b") as shard:
            shard.seek(int(entry["image_offset"]))
            shard.write(bytes(int(entry["image_length"])))
    last = _read(Index.open(directory), encoder, role=StageRole(first=False, last=True))
    first = _read(prepared.index, encoder, role=StageRole(first=True, last=False))
    middle = _read(prepared.index, encoder, role=StageRole(first=False, last=False))
    for number, step in enumerate(one_rank):
        for slot, whole in enumerate(step):
            assert torch.equal(last[number][slot].targets, whole.targets) and torch.equal(
                last[number][slot].target_rows, whole.target_rows
            )
            assert last[number][slot].pixels is None and last[number][slot].token_ids is None
            assert torch.equal(first[number][slot].pixels, whole.pixels) and first[number][slot].targets is None
            assert middle[number][slot] == Batch(None, None, None, None, None)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_cannot_be_read_keeps_its_slot(prepared, encoder, tmp_path: Path, num_workers: int):
    """A damaged image, a damaged text and an intact file that is no image are reported and replaced."""
    directory = Path(shutil.copytree(prepared.directory, tmp_path / "damaged"))
    index = Index.open(directory)
    plan = _plan(index, order="sequential")
    whole = _read(index, encoder, plan=plan, stop_step=3)
    _overwrite(index, 9, "image", 9, b"\0\0\0")
    _overwrite(index, 13, "text", 2, b"\0")
    options = LoaderOptions(num_workers=num_workers)
    loader = Loader(index, plan, encoder, role=BOTH, data_rank=0, data_size=1, options=options)
    steps = list(loader.steps(0, 3))
    faults = {fault.row: fault for step in steps for reading in step for fault in reading.faults}
    assert sorted(faults) == [9, 13] and faults[9].name == "shard-000001.tar:img_9"
    assert all(fault.reason.startswith(f"{fault.name}: crc32 is") for fault in faults.values())
    for step, expected in zip(steps, whole):
        for reading, batch in zip(step, expected):
            bad = [fault.row for fault in reading.faults]
            if not bad:
                assert _same(reading.batch, batch)
                continue
            [row] = bad
            place = row % 2
            spared = (batch.target_rows // plan.global_batch(1).sequence_length) != place
            assert torch.equal(reading.batch.targets, batch.targets[spared]) and torch.equal(
                reading.batch.target_rows, batch.target_rows[spared]
            )
            assert reading.batch.pixels.shape == batch.pixels.shape and len(reading.batch.image_slots) == len(
                batch.image_slots
            )
            number = sum(int(index.rows[other]["n_img"]) for other in range(row - place, row))
            assert torch.equal(reading.batch.pixels[number], mean_colour_images(1, encoder.images)[0])
            assert torch.equal(reading.batch.token_ids[1 - place], batch.token_ids[1 - place])


def _overwrite(index: Index, row: int, kind: str, offset: int, content: bytes) -> None:
    entry = index.rows[row]
    with (index.directory / f"shard-{entry['shard']:06d}.tar").open("r+b") as shard:
        shard.seek(int(entry[f"{kind}_offset"]) + offset)
        shard.write(content)


def test_labels_are_masked_for_what_other_ranks_could_not_read(prepared, encoder, one_rank):
    plan = _plan(prepared.index)
    loader = Loader(prepared.index, plan, encoder, role=StageRole(first=False, last=True), data_rank=0, data_size=1)
    [step] = loader.steps(0, 1)
    micro_batch = plan.micro_batches(plan.global_batch(0), data_rank=0, data_size=1)[1]
    masked = loader.mask_samples(step[1].batch, micro_batch, rows=frozenset(micro_batch.rows[:1]))
    spared = step[1].batch.target_rows >= micro_batch.sequence_length
    assert torch.equal(masked.targets, step[1].batch.targets[spared]) and 0 < int(spared.sum()) < len(spared)


def test_shares_of_the_images_make_the_whole(prepared, encoder, one_rank):
    """Three ranks of a TP group share the images; the first also reads the text."""
    shares = [ImageSharding(rank, 3) for rank in range(3)]
    loaders = [
        Loader(
            prepared.index, _plan(prepared.index), encoder, role=BOTH, data_rank=0, data_size=1, image_sharding=share
        )
        for share in shares
    ]
    for ranks, batches in zip(zip(*(loader.steps(0, 4) for loader in loaders), strict=True), one_rank, strict=True):
        for readings, batch in zip(zip(*ranks), batches, strict=True):
            for rank, reading in enumerate(readings):
                assert torch.equal(reading.batch.pixels, batch.pixels[rank::3])
            assert torch.equal(readings[0].batch.token_ids, batch.token_ids) and readings[1].batch.token_ids is None


class DecodesInRank(LoaderOptions):
    """Loader options with decoding in the rank instead of the workers, as with GPU decoding."""

    decodes_in_rank = True


def test_decoding_in_the_rank_gives_the_same(prepared, encoder, one_rank, tmp_path: Path):
    loader = Loader(
        prepared.index,
        _plan(prepared.index),
        encoder,
        role=BOTH,
        data_rank=0,
        data_size=1,
        options=DecodesInRank(num_workers=2),
    )
    for step, batches in zip(loader.steps(0, 4), one_rank, strict=True):
        assert all(
            _same(reading.batch, batch) and not reading.files for reading, batch in zip(step, batches, strict=True)
        )
    index = Index.open(shutil.copytree(prepared.directory, tmp_path / "damaged"))
    _overwrite(index, 9, "image", 9, b"\0\0\0")
    plan = _plan(index, order="sequential")
    (_, step) = Loader(index, plan, encoder, role=BOTH, data_rank=0, data_size=1, options=DecodesInRank()).steps(0, 2)
    assert [[fault.row for fault in reading.faults] for reading in step] == [[9], [], [], []] and "crc32 is" in step[
        0
    ].faults[0].reason


class Dies:
    """Encoder that kills its process at one sample."""

    def __init__(self, encoder, key: str) -> None:
        self.encoder, self.key = encoder, key
        self.images = encoder.images

    def encode(self, sample, *, with_pixels: bool):
        if sample.key == self.key:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.encoder.encode(sample, with_pixels=with_pixels)


def test_a_micro_batch_that_kills_every_worker_is_given_up(prepared, encoder, one_rank):
    plan = _plan(prepared.index, order="sequential")
    whole = _read(prepared.index, encoder, plan=plan, stop_step=2)
    loader = Loader(
        prepared.index,
        plan,
        Dies(encoder, "txt_5"),
        role=BOTH,
        data_rank=0,
        data_size=1,
        options=LoaderOptions(num_workers=2),
    )
    readings = [reading for step in loader.steps(0, 2) for reading in step]
    assert [[fault.row for fault in reading.faults] for reading in readings] == [[], [], [4, 5], [], [], [], [], []]
    assert "killed by SIGKILL while it read this sample's micro-batch" in readings[2].faults[0].reason
    expected = [batch for step in whole for batch in step]
    assert all(
        _same(reading.batch, batch) for number, (reading, batch) in enumerate(zip(readings, expected)) if number != 2
    )
    given_up = readings[2].batch
    assert given_up.token_ids.shape == expected[2].token_ids.shape and not given_up.targets.numel()
    assert (
        len(given_up.image_slots) == len(expected[2].image_slots) and given_up.pixels.shape == expected[2].pixels.shape
    )


def test_storage_that_answers_with_errors_is_asked_again(prepared, encoder, one_rank, monkeypatch, caplog):
    real, failures = os.pread, iter([True] * 3)

    def flaky(*arguments):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr("megatron_share4v.data.store.sample_reader.PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "pread", flaky)
    with caplog.at_level("WARNING", logger="megatron_share4v"):
        assert all(_same(a, b) for a, b in zip(_read(prepared.index, encoder, stop_step=1)[0], one_rank[0]))
    assert [record.getMessage().endswith("retrying in 0 s") for record in caplog.records] == [True] * 3
    monkeypatch.setattr(os, "pread", lambda *arguments: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    [[reading]] = Loader(
        prepared.index, _plan(prepared.index, global_batch_size=2), encoder, role=BOTH, data_rank=0, data_size=1
    ).steps(0, 1)
    assert len(reading.faults) == 2 and "cannot be read after 3 retries" in reading.faults[0].reason


def test_ranks_that_cannot_share_are_refused(prepared, encoder):
    for role in (BOTH, StageRole(first=False, last=False)):
        with pytest.raises(ConfigError, match="do not divide by 3 data-parallel ranks"):
            _read(prepared.index, encoder, role=role, data_size=3)


SCRIPT = """
    import sys
    from megatron_share4v.data.loading.collate import StageRole
    from megatron_share4v.data.loading.encode import Encoder
    from megatron_share4v.data.images.policy import ImagePolicy
    from megatron_share4v.data.store.index import Index
    from megatron_share4v.data.loading.loader import Loader, LoaderOptions
    from megatron_share4v.data.sampling.sampler import Sampler
    from megatron_share4v.text.template import get_template
    from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer

    if __name__ == "__main__":
        index = Index.open(sys.argv[1])
        sampler = Sampler(
            index, order="random", group_size=None, seed=0, global_batch_size=4, micro_batch_size=2,
            tokens_per_image=4, pad_multiple=8,
        )
        encoder = Encoder(SentencePieceTokenizer(sys.argv[2]), get_template("vicuna_v1"), 512, ImagePolicy(28))
        options = LoaderOptions(num_workers=2, prefetch=4)
        role = StageRole(True, True)
        loader = Loader(index, sampler, encoder, role=role, data_rank=0, data_size=1, options=options)
        stream = loader.steps(0, 10**6)
        next(stream)
        print("got one", flush=True)
        raise SystemExit(3)
"""


def test_workers_do_not_hold_up_the_exit(prepared, tmp_path: Path):
    script = tmp_path / "stops_early.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script), str(prepared.directory), str(prepared.tokenizer_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stdout) == (3, "got one\n"), result.stderr
    assert "Traceback" not in result.stderr
