"""Saves that are killed, hit a full disk, or run in the background.

Older checkpoints stay valid, and a partly written one is never loaded.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_injection import train

from megatron_share4v.errors import ConfigError, disk_errors_as_config_error
from megatron_share4v.logging import configure

BACKGROUND = "checkpoint.in_background=true"


def read_tensor_files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


def test_background_save_equals_a_blocking_one(runs) -> None:
    directory = runs.root / "background"
    outcome = train(runs.config, 2, f"run.directory={directory}", BACKGROUND, faults="slow_save:0:2:2")
    assert outcome.codes == [0, 0] and runs.curve(directory) == runs.reference, outcome.output
    log = outcome.output
    assert (
        log.index("step 3 copied in")
        < log.index("step 4/8")
        < log.index("checkpoint: wrote")
        < log.index("step 6 copied in")
    ), log
    # The save of step 6 starts before that of step 3 has finished.
    assert float(re.search(r"step 6 copied in [\d.]+ s, after waiting ([\d.]+) s", log)[1]) > 0.5, log
    for name in ("step_00000006", "step_00000008"):
        actual, expected = (
            read_tensor_files(root / "checkpoints" / name) for root in (directory, runs.root / "reference")
        )
        assert actual == expected and len(actual) > 1
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000008\n"
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "latest",
        "step_00000006",
        "step_00000008",
    ]


@pytest.mark.parametrize("options", [(), (BACKGROUND,)], ids=["waiting", "background"])
def test_killed_while_saving(runs, options: tuple[str, ...]) -> None:
    """Rank 0 is killed after all tensors of the second save are written and before the checkpoint is published."""
    directory = runs.root / f"killed_saving{len(options)}"
    outcome = train(runs.config, 2, f"run.directory={directory}", *options, faults="kill_in_save:0:1:6")
    assert outcome.codes[0] == -9, outcome.output
    assert {path.name for path in (directory / "checkpoints").iterdir()} >= {"step_00000003", ".step_00000006.writing"}
    outcome = train(runs.config, 2, f"run.directory={directory}", *options)
    assert (
        outcome.codes == [0, 0]
        and ".step_00000006.writing, left behind" in outcome.output
        and "at step 3" in outcome.output
    )
    assert runs.curve(directory) == runs.reference


@pytest.mark.parametrize("options", [(), (BACKGROUND,)], ids=["waiting", "background"])
def test_full_disk(runs, options: tuple[str, ...]) -> None:
    """One of two TP ranks cannot write large files: all ranks report it, and the previous checkpoint is used."""
    directory = runs.root / f"full{len(options)}"
    common = (f"run.directory={directory}", "parallel.tensor=2")
    outcome = train(runs.config, 2, *common, *options, faults="full:1:5:60000")
    assert outcome.codes[0] == 2 and "Traceback" not in outcome.output.partition("error: ")[0], outcome.output
    assert re.search(
        r"error: rank 0: .*step_00000006.*: cannot be written \(rank 1: .*File too large", outcome.output
    ), outcome.output
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_00000003"]
    outcome = train(runs.config, 2, *common)
    assert outcome.codes == [0, 0] and "at step 3" in outcome.output, outcome.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Mount point and process id of a 5 MB tmpfs in a mount namespace; skips without user namespaces."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on PATH")
    mount = f"mount -t tmpfs -o size=5m small {tmp_path} && echo mounted && exec sleep 600"
    with subprocess.Popen(
        ["unshare", "-Urm", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if process.stdout.readline() != "mounted\n":
            pytest.skip(f"cannot mount a tmpfs in a user namespace: {process.communicate()[1]}")
        yield tmp_path, process.pid
        process.kill()


def test_full_disk_while_writing_metrics(runs, small_disk: tuple[Path, int]) -> None:
    """A truncated line of metrics.jsonl and other damaged files beside the checkpoints do not prevent a restart."""
    directory, pid = small_disk
    seen = Path(f"/proc/{pid}/root{directory}")
    enter, options = f"enter:0:0:{pid},enter:1:0:{pid}", (f"run.directory={directory}", "train.bad_steps.loss_factor=9")
    outcome = train(runs.config, 2, *options, faults=f"{enter},fill:0:5:{directory / 'junk'}")
    assert outcome.codes[0] == 2 and f"error: rank 0: {directory} cannot be read or written on " in outcome.output, (
        outcome.output
    )
    assert (
        "the state of rank 0 cannot be written" in outcome.output
        and "No space left on device; see to the disk" in outcome.output
        and "JSONDecodeError" not in outcome.output
    )
    assert not (seen / "metrics.jsonl").read_text().endswith("\n"), "the last line is truncated"
    (seen / "junk").unlink()
    whole = (seen / "metrics.jsonl").read_text().splitlines(keepends=True)
    (seen / "metrics.jsonl").write_bytes(
        "".join(whole[:2]).encode() + b'7\n{"step": \xff}\n' + "".join(whole[2:]).encode()
    )
    for name in ("ops.json", "run_card.json"):
        (seen / name).write_text("")
    outcome = train(runs.config, 2, *options, faults=enter)
    assert outcome.codes == [0, 0] and "at step 3" in outcome.output and runs.curve(seen) == runs.reference, (
        outcome.output
    )
    assert (
        "metrics.jsonl:3: '7' is not the line of a step; left out" in outcome.output
        and "ops.json cannot be read" in outcome.output
    )


def test_messages_of_disk_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank0.txt").symlink_to("/dev/full")
    logger = configure(rank=0, directory=tmp_path)
    logger.info("one")
    logger.info("two")
    stderr = capsys.readouterr().err
    assert (
        stderr.count("rank0.txt: some lines could not be written: [Errno 28] No space left on device") == 1
        and "Traceback" not in stderr
        and "two" in stderr
    )
    with contextlib.suppress(OSError):  # flushing the remaining buffer fails
        configure(rank=0)
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="file/log cannot be read or written on .*: Not a directory; see to"),
        disk_errors_as_config_error(tmp_path),
    ):
        (tmp_path / "file" / "log").mkdir()
    with pytest.raises(FileNotFoundError), disk_errors_as_config_error(tmp_path):
        (tmp_path.parent / "no such file").read_text()
    with pytest.raises(ConnectionResetError), disk_errors_as_config_error(tmp_path):
        raise ConnectionResetError("not a disk error")


def test_error_in_a_writer_thread_fails_the_save(runs) -> None:
    """torch's writer threads drop their errors; without a check an incomplete checkpoint would be published."""
    directory = runs.root / "lost_file"
    outcome = train(runs.config, 1, f"run.directory={directory}", faults="lost_file:0:5")
    assert outcome.codes == [2] and re.search(
        r"error: .*cannot be written \(rank 0: OSError\(28, 'No space left", outcome.output
    ), outcome.output
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_00000003"]
