"""Resuming is bitwise at the same layout and reads exact values at any other; all ranks raise the same error."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from small_run import Run, Setting, opened, stored_tensors
from tolerances import LAYOUT_LOSS, LAYOUT_NORM

HALF, WHOLE = 2, 4
MAIN = Setting(tensor=2, pipeline=2)


def resume_is_bitwise(directory: Path, setting: Setting) -> list[tuple[float, float]]:
    """Check that 2 steps, save, load into new objects and 2 steps equal 4 steps; return (loss, norm) of the 4 steps."""
    with opened(setting) as mesh:
        first, second = Run(mesh, setting, seed=1), Run(mesh, setting, seed=2)
        results = first.train(0, HALF)
        path = first.save(directory, HALF)
        state = second.load(path)
        assert (state.step, state.consumed_samples, state.plan_fingerprint) == (HALF, HALF * 16, "plan")
        assert all(map(torch.equal, first.weights(), second.weights())), setting
        results += first.train(HALF, WHOLE)
        assert second.train(HALF, WHOLE) == results[HALF:], setting
        assert all(map(torch.equal, first.weights(), second.weights())), setting
    return results


def saving_changes_nothing(results: list[tuple[float, float]]) -> None:
    with opened(MAIN) as mesh:
        assert Run(mesh, MAIN, seed=1).train(0, WHOLE) == results


def resharded(directory: Path, source: Path, setting: Setting) -> list[tuple[float, float]]:
    """Load at another layout, save what was read, then continue training."""
    with opened(setting) as mesh:
        run = Run(mesh, setting, seed=2)
        run.load(source)
        run.save(directory, HALF)
        return run.train(HALF, WHOLE)


def settings_keep_their_own_rates(source: Path) -> None:
    with opened(MAIN) as mesh:
        run = Run(mesh, replace(MAIN, learning_rate=5e-4), seed=2)
        before = [
            {key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups
        ]
        run.load(source)
        assert [
            {key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups
        ] == before


def weights_for_another_stage(source: Path) -> None:
    """Load weights for stage 2: other trained parts, no optimizer, unwrapped chunks; a new optimizer uses them."""
    from megatron_share4v.checkpoint.store import load_weights

    with opened(MAIN) as mesh:
        run, expected = Run(mesh, replace(MAIN, trainable="projector"), seed=2), Run(mesh, MAIN, seed=3)
        manifest = load_weights(source.parent, chunks=run.bare)
        assert manifest.state.step == HALF and manifest.config == "run: {}\n"
        expected.load(source)
        assert all(map(torch.equal, run.weights(), expected.weights()))


def message_of(action) -> str:
    """Return the message of the CheckpointError that `action` raises, equal on all ranks."""
    from megatron_share4v.errors import CheckpointError
    from megatron_share4v.parallel.collectives import gather_objects

    with pytest.raises(CheckpointError) as caught:
        action()
    messages = gather_objects(str(caught.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


def mismatch_messages(source: Path) -> list[str]:
    """Return the messages for another width, more layers, other trained parts, and weights without optimizer."""
    from megatron_share4v.checkpoint.store import CheckpointContents, RunState, load_weights, write_checkpoint

    with opened(MAIN) as mesh:
        wider, deeper, other, same = (
            Run(mesh, replace(MAIN, **change), seed=2)
            for change in ({"language_width": 64}, {"language_layers": 6}, {"trainable": "projector"}, {})
        )
        alone = source.parent.parent / "weights_alone"
        state = RunState(step=0, consumed_samples=0, plan_fingerprint="")
        write_checkpoint(
            alone, CheckpointContents(chunks=same.bare, optimizer=None, mesh=mesh, state=state, config_text="")
        )
        load_weights(alone, chunks=same.bare)
        return [
            message_of(lambda: wider.load(source)),
            message_of(lambda: load_weights(source, chunks=deeper.bare)),
            message_of(lambda: other.load(source)),
            message_of(lambda: same.load(alone)),
            message_of(lambda: same.load(source.parent / "step_00000099")),
            message_of(lambda: same.save(source / "manifest.json" / "below", 1)),
        ]


def failed_writes_are_agreed_on(directory: Path) -> str:
    """A rank that cannot write: all ranks raise, nothing is published, and the next save removes the leftovers."""
    from torch.distributed.checkpoint import FileSystemWriter

    def full(self, plan, planner):
        raise OSError(28, "No space left on device")

    with opened(MAIN) as mesh:
        run = Run(mesh, MAIN, seed=1)
        original = FileSystemWriter.write_data
        if mesh.rank == 1:
            FileSystemWriter.write_data = full
        message = message_of(lambda: run.save(directory, 1))
        FileSystemWriter.write_data = original
        assert [path.name for path in directory.iterdir()] == [".step_00000001.writing"]
        dist.barrier()
        run.save(directory, 1)
        run.save(directory, 1)
        assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000001"]
    return message


def damage_is_agreed_on(directory: Path) -> tuple[str, str, Path | None, Path | None]:
    """Flip a byte in the newest of two checkpoints."""
    from megatron_share4v.checkpoint.store import find_latest_complete, find_resume_checkpoint

    with opened(MAIN) as mesh:
        run = Run(mesh, MAIN, seed=1)
        run.save(directory, 1)
        newest = run.save(directory, 2)
        if mesh.rank == 0:
            flip_a_byte(next(newest.glob("*.distcp")))
        dist.barrier()
        message, by_size = message_of(lambda: run.load(newest)), find_latest_complete(directory)
        dist.barrier()
        with_contents = find_resume_checkpoint(directory)
        run.load(with_contents, verified=True)
        alone = directory / "alone"
        if mesh.rank == 0:
            shutil.copytree(directory / "step_00000002.damaged", alone / "step_00000002")
        dist.barrier()
        refused = message_of(lambda: find_resume_checkpoint(alone))
        return message, refused, with_contents, by_size


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def four_ranks(directory: Path) -> dict:
    """Run all checks that need four ranks in one world."""
    results = {"main": resume_is_bitwise(directory / "main", MAIN)}
    saving_changes_nothing(results["main"])
    source = directory / "main" / "step_00000002"
    for name, setting in FOUR.items():
        results[name] = resharded(directory / name, source, setting)
    for name, setting in RESUMED.items():
        resume_is_bitwise(directory / f"resumed_{name}", setting)
    settings_keep_their_own_rates(source)
    weights_for_another_stage(source)
    results["misfits"] = mismatch_messages(source)
    results["full"] = failed_writes_are_agreed_on(directory / "full")
    results["damage"] = damage_is_agreed_on(directory / "damage")
    return results


def few_ranks(directory: Path, settings: dict[str, Setting]) -> dict:
    return {
        name: resharded(directory / name, directory / "main" / "step_00000002", setting)
        for name, setting in settings.items()
    }


FOUR = {
    "tensor2_data2": Setting(tensor=2, sequence=True),
    "pipeline2_virtual2_data2": Setting(pipeline=2, virtual=2),
    "data4": Setting(),
    "tensor2_data2_unsharded": Setting(tensor=2, distributed_optimizer=False),
}
TWO = {"data2": Setting(), "pipeline2_unsharded": Setting(pipeline=2, distributed_optimizer=False)}
ONE = {"one": Setting()}
RESUMED = {
    "unsharded": replace(MAIN, distributed_optimizer=False),
    "bf16": Setting(tensor=2, dtype="bf16"),
    "bf16_unsharded": replace(MAIN, dtype="bf16", distributed_optimizer=False),
    "projector": replace(MAIN, trainable="projector"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(directory: Path) -> dict:
    results = run_world(4, four_ranks, directory)[0]
    return {**results, **run_world(2, few_ranks, directory, TWO)[0], **run_world(1, few_ranks, directory, ONE)[0]}


@pytest.mark.parametrize("name", [*FOUR, *TWO, *ONE])
def test_every_layout_reads_the_same_state_and_goes_on(results: dict, directory: Path, name: str) -> None:
    written, read = (stored_tensors(directory / folder / "step_00000002") for folder in ("main", name))
    assert written.keys() == read.keys()
    assert not [key for key in written if not torch.equal(written[key], read[key])]
    updates = [
        json.loads((directory / folder / "step_00000002" / "manifest.json").read_text())["updates"]
        for folder in ("main", name)
    ]
    assert updates == [HALF, HALF]
    for (loss, norm), (expected_loss, expected_norm) in zip(results[name], results["main"][HALF:], strict=True):
        assert abs(loss - expected_loss) <= LAYOUT_LOSS and math.isclose(norm, expected_norm, rel_tol=LAYOUT_NORM)


def test_only_trained_parts_have_state(results: dict, directory: Path) -> None:
    tensors = stored_tensors(directory / "main" / "step_00000002")
    moments = {
        name.removeprefix("optimizer.state.exp_avg.") for name in tensors if name.startswith("optimizer.state.exp_avg.")
    }
    assert "vision.layers.1.mlp.linear_fc1.weight" in moments and "vision.layers.0.mlp.linear_fc1.weight" in tensors
    assert not {name for name in moments if name.startswith("vision.layers.0.")}
    projector = stored_tensors(directory / "resumed_projector" / "step_00000002")
    assert {name.split(".")[3] for name in projector if name.startswith("optimizer.state.")} == {"projector"}


def test_bf16_keeps_full_precision_weights(results: dict, directory: Path) -> None:
    tensors = stored_tensors(directory / "resumed_bf16" / "step_00000002")
    main, weight = (tensors[prefix + "language.head.weight"] for prefix in ("optimizer.state.param.", ""))
    assert (main.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(main.bfloat16(), weight) and not torch.equal(main, weight.float())


def test_misfits_name_tensors_and_shapes(results: dict) -> None:
    wider, deeper, other, alone, absent, below = results["misfits"]
    assert (
        "is of another model" in wider
        and "linear_fc1.weight: shape [128, 32] here, shape [96, 32] in the checkpoint" in wider
    )
    assert "language.decoder.layers.4." in deeper and "not there in the checkpoint" in deeper and "and " in deeper
    assert (
        "optimizer state of other trained parts" in other and "not there here" in other and "initialize_from" in other
    )
    assert "holds only weights" in alone
    assert "step_00000099: there is no such checkpoint directory" in absent
    assert "manifest.json" in below and "Not a directory" in below


def test_write_failure_of_one_rank_is_raised_on_all(results: dict) -> None:
    assert "cannot be written" in results["full"] and "rank 1" in results["full"] and "No space left" in results["full"]


def test_damage_is_named_on_all_ranks_and_passed_over(results: dict) -> None:
    message, refused, with_contents, by_size = results["damage"]
    assert "step_00000002: damaged: __" in message and ".distcp has other content than was written" in message
    assert with_contents.name == "step_00000001"
    assert by_size.name == "step_00000002", "without a mesh sizes alone are compared"
    assert (
        "none of its 1 checkpoints is whole" in refused
        and ".distcp has other content" in refused
        and "to restart the run" in refused
    )


def test_latest_names_the_newest(results: dict, directory: Path) -> None:
    from megatron_share4v.checkpoint.store import resolve_checkpoint
    from megatron_share4v.errors import CheckpointError

    newest, latest = directory / "damage" / "step_00000002", directory / "damage" / "latest"
    assert latest.read_text() == "step_00000001\n" and not newest.exists(), "the damaged checkpoint was renamed"
    (directory / "damage" / "step_00000002.damaged").rename(newest)
    latest.write_text("step_00000002\n")
    assert (
        resolve_checkpoint(directory / "damage" / "latest")
        == resolve_checkpoint(directory / "damage")
        == resolve_checkpoint(newest)
        == newest
    )
    (newest / "manifest.json").rename(newest / "elsewhere")
    assert resolve_checkpoint(directory / "damage").name == "step_00000001"
    (directory / "damage" / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        resolve_checkpoint(directory / "damage")


def killed_while_saving(directory: Path, moment: str) -> None:
    """Save twice; SIGKILL in the middle of the second save."""
    from megatron_share4v.checkpoint import store

    def die(*args, **kwargs):
        os.kill(os.getpid(), 9)

    with opened(Setting()) as mesh:
        run = Run(mesh, Setting(), seed=1)
        run.train(0, 1)
        run.save(directory, 1)
        if moment == "tensors":
            os.fsync = die  # its first call is for the first file of tensors
        else:
            store.publish = die
        run.save(directory, 2)


def start_after_kill(directory: Path, messages: list[str]) -> tuple[int, list[str]]:
    import logging

    from megatron_share4v.checkpoint.store import find_resume_checkpoint
    from megatron_share4v.logging import get_logger

    class Collector(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    get_logger().addHandler(Collector())
    get_logger().setLevel(logging.INFO)
    with opened(Setting()) as mesh:
        run = Run(mesh, Setting(), seed=2)
        state = run.load(find_resume_checkpoint(directory), verified=True)
        run.train(1, 2)
        run.save(directory, 2)
    return state.step, messages


@pytest.mark.parametrize("moment", ["tensors", "publication"])
def test_killed_save_leaves_the_one_before(tmp_path: Path, moment: str) -> None:
    with pytest.raises(AssertionError, match="died without a report"):
        run_world(1, killed_while_saving, tmp_path, moment)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_00000002.writing", "latest", "step_00000001"]
    assert list((tmp_path / ".step_00000002.writing").glob("*.distcp"))
    [(step, messages)] = run_world(1, start_after_kill, tmp_path, [])
    assert step == 1
    assert any("removed" in message and ".step_00000002.writing, left behind" in message for message in messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


@pytest.mark.parametrize("content", [b"", b"# A readme\n\nof several lines\n", b"a" * 5000, b"\x80\x02}q\x00"])
def test_a_file_that_names_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    from megatron_share4v.checkpoint.store import resolve_checkpoint
    from megatron_share4v.errors import CheckpointError

    file = tmp_path / "README.md"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"README\.md: is a file that names no checkpoint; give the directory"):
        resolve_checkpoint(file)
