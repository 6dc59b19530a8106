"""Saves that are killed, meet a full disk, or run while training goes on: what is there before stays, and nothing half-written is taken for whole."""

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


def tensors(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


def test_in_the_background_the_same_is_written_while_training_goes_on(bench) -> None:
    directory = bench.root / "background"
    outcome = train(bench.config, 2, f"run.directory={directory}", BACKGROUND, faults="slow_save:0:2:2")
    assert outcome.codes == [0, 0] and bench.curve(directory) == bench.undisturbed, outcome.output
    log = outcome.output
    assert (
        log.index("step 3 copied in")
        < log.index("step 4/8")
        < log.index("checkpoint: wrote")
        < log.index("step 6 copied in")
    ), log
    # The save at step 6 comes before that of step 3 is written.
    assert float(re.search(r"step 6 copied in [\d.]+ s, after waiting ([\d.]+) s", log)[1]) > 0.5, log
    for name in ("step_00000006", "step_00000008"):
        ours, theirs = (tensors(root / "checkpoints" / name) for root in (directory, bench.root / "undisturbed"))
        assert ours == theirs and len(ours) > 1
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000008\n"
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "latest",
        "step_00000006",
        "step_00000008",
    ]


@pytest.mark.parametrize("options", [(), (BACKGROUND,)], ids=["waiting", "background"])
def test_killed_while_saving(bench, options: tuple[str, ...]) -> None:
    """Rank 0 dies when all tensors of the second save are written but nothing is published."""
    directory = bench.root / f"killed_saving{len(options)}"
    outcome = train(bench.config, 2, f"run.directory={directory}", *options, faults="kill_in_save:0:1:6")
    assert outcome.codes[0] == -9, outcome.output
    assert {path.name for path in (directory / "checkpoints").iterdir()} >= {"step_00000003", ".step_00000006.writing"}
    outcome = train(bench.config, 2, f"run.directory={directory}", *options)
    assert (
        outcome.codes == [0, 0]
        and ".step_00000006.writing, left behind" in outcome.output
        and "at step 3" in outcome.output
    )
    assert bench.curve(directory) == bench.undisturbed


@pytest.mark.parametrize("options", [(), (BACKGROUND,)], ids=["waiting", "background"])
def test_full_disk(bench, options: tuple[str, ...]) -> None:
    """One of two tensor ranks can write no large file from the second save on: all end with the reason, and the checkpoint before is used."""
    directory = bench.root / f"full{len(options)}"
    common = (f"run.directory={directory}", "parallel.tensor=2")
    outcome = train(bench.config, 2, *common, *options, faults="full:1:5:60000")
    assert outcome.codes[0] == 2 and "Traceback" not in outcome.output.partition("error: ")[0], outcome.output
    assert re.search(
        r"error: rank 0: .*step_00000006.*: cannot be written \(rank 1: .*File too large", outcome.output
    ), outcome.output
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_00000003"]
    outcome = train(bench.config, 2, *common)
    assert outcome.codes == [0, 0] and "at step 3" in outcome.output, outcome.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file system of 5 MB, mounted where only one process sees it: (the place, that process). Skips where the kernel lets users have no namespaces."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on PATH")
    mount = f"mount -t tmpfs -o size=5m small {tmp_path} && echo mounted && exec sleep 600"
    with subprocess.Popen(
        ["unshare", "-Urm", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if process.stdout.readline() != "mounted\n":
            pytest.skip(f"no file system of our own here: {process.communicate()[1]}")
        yield tmp_path, process.pid
        process.kill()


def test_disk_that_is_really_full(bench, small_disk: tuple[Path, int]) -> None:
    """Not in a save, when a line of metrics.jsonl is written: half of it is. Whatever else is spoiled beside the checkpoints keeps nobody from going on."""
    directory, pid = small_disk
    seen = Path(f"/proc/{pid}/root{directory}")
    enter, options = f"enter:0:0:{pid},enter:1:0:{pid}", (f"run.directory={directory}", "train.bad_steps.loss_factor=9")
    outcome = train(bench.config, 2, *options, faults=f"{enter},fill:0:5:{directory / 'junk'}")
    assert outcome.codes[0] == 2 and f"error: rank 0: {directory} cannot be read or written on " in outcome.output, (
        outcome.output
    )
    assert (
        "where rank 0 is cannot be written" in outcome.output
        and "No space left on device; see to the disk" in outcome.output
        and "JSONDecodeError" not in outcome.output
    )
    assert not (seen / "metrics.jsonl").read_text().endswith("\n"), "a line is cut off"
    (seen / "junk").unlink()
    whole = (seen / "metrics.jsonl").read_text().splitlines(keepends=True)
    (seen / "metrics.jsonl").write_bytes(
        "".join(whole[:2]).encode() + b'7\n{"step": \xff}\n' + "".join(whole[2:]).encode()
    )
    for name in ("ops.json", "run_card.json"):
        (seen / name).write_text("")
    outcome = train(bench.config, 2, *options, faults=enter)
    assert outcome.codes == [0, 0] and "at step 3" in outcome.output and bench.curve(seen) == bench.undisturbed, (
        outcome.output
    )
    assert (
        "metrics.jsonl:3: '7' is not the line of a step; left out" in outcome.output
        and "ops.json cannot be read" in outcome.output
    )


def test_what_a_full_disk_and_a_wrong_place_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank0.txt").symlink_to("/dev/full")
    logger = configure(rank=0, directory=tmp_path)
    logger.info("one")
    logger.info("two")
    said = capsys.readouterr().err
    assert (
        said.count("rank0.txt: some lines could not be written: [Errno 28] No space left on device") == 1
        and "Traceback" not in said
        and "two" in said
    )
    with contextlib.suppress(OSError):  # what is left in its buffer
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
        raise ConnectionResetError("that is no disk")


def test_one_lost_file_is_not_a_checkpoint(bench) -> None:
    """torch's writing threads lose their errors; the checkpoint would lack tensors and be hashed as if it were whole."""
    directory = bench.root / "lost_file"
    outcome = train(bench.config, 1, f"run.directory={directory}", faults="lost_file:0:5")
    assert outcome.codes == [2] and re.search(
        r"error: .*cannot be written \(rank 0: OSError\(28, 'No space left", outcome.output
    ), outcome.output
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_00000003"]
