"""Saves that are killed, meet a full disk, or run while training goes on: what is there before stays, and nothing half-written is taken for whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faulty import train

BACKGROUND = "checkpoint.in_background=true"


def tensors(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


def test_in_the_background_the_same_is_written_while_training_goes_on(bench) -> None:
    directory = bench.root / "background"
    outcome = train(bench.config, 2, f"run.directory={directory}", BACKGROUND, faults="slow_save:0:2:2")
    assert outcome.codes == [0, 0] and bench.curve(directory) == bench.undisturbed, outcome.output
    log = outcome.output
    assert log.index("step 3 copied in") < log.index("step 4/8") < log.index("checkpoint: wrote") < log.index("step 6 copied in"), log
    # The save at step 6 comes before that of step 3 is written.
    assert float(re.search(r"step 6 copied in [\d.]+ s, after waiting ([\d.]+) s", log)[1]) > 0.5, log
    for name in ("step_00000006", "step_00000008"):
        ours, theirs = (tensors(root / "checkpoints" / name) for root in (directory, bench.root / "undisturbed"))
        assert ours == theirs and len(ours) > 1
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000008\n"
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["latest", "step_00000006", "step_00000008"]


@pytest.mark.parametrize("options", [(), (BACKGROUND,)], ids=["waiting", "background"])
def test_killed_while_saving(bench, options: tuple[str, ...]) -> None:
    """Rank 0 dies when all tensors of the second save are written but nothing is published."""
    directory = bench.root / f"killed_saving{len(options)}"
    outcome = train(bench.config, 2, f"run.directory={directory}", *options, faults="kill_in_save:0:1:6")
    assert outcome.codes[0] == -9, outcome.output
    assert {path.name for path in (directory / "checkpoints").iterdir()} >= {"step_00000003", ".step_00000006.writing"}
    outcome = train(bench.config, 2, f"run.directory={directory}", *options)
    assert outcome.codes == [0, 0] and ".step_00000006.writing, left behind" in outcome.output and "at step 3" in outcome.output
    assert bench.curve(directory) == bench.undisturbed


@pytest.mark.parametrize("options", [(), (BACKGROUND,)], ids=["waiting", "background"])
def test_full_disk(bench, options: tuple[str, ...]) -> None:
    """One of two tensor ranks can write no large file from the second save on: all end with the reason, and the checkpoint before is used."""
    directory = bench.root / f"full{len(options)}"
    common = (f"run.directory={directory}", "parallel.tensor=2")
    outcome = train(bench.config, 2, *common, *options, faults="full:1:5:60000")
    assert outcome.codes[0] == 2 and "Traceback" not in outcome.output.partition("error: ")[0], outcome.output
    assert re.search(r"error: rank 0: .*step_00000006.*: cannot be written \(rank 1: .*File too large", outcome.output), outcome.output
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_00000003"]
    outcome = train(bench.config, 2, *common)
    assert outcome.codes == [0, 0] and "at step 3" in outcome.output, outcome.output


def test_one_lost_file_is_not_a_checkpoint(bench) -> None:
    """torch's writing threads lose their errors; the checkpoint would lack tensors and be hashed as if it were whole."""
    directory = bench.root / "lost_file"
    outcome = train(bench.config, 1, f"run.directory={directory}", faults="lost_file:0:5")
    assert outcome.codes == [2] and re.search(r"error: .*cannot be written \(rank 0: OSError\(28, 'No space left", outcome.output), outcome.output
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_00000003"]
