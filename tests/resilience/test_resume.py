"""Restarts from damaged checkpoints or with another configuration."""

from __future__ import annotations

import re
import shutil

from fault_injection import train
from launching import lines

from megatron_share4v.resilience.exit_analysis import analyze_exit


def test_corrupt_newest_checkpoint_falls_back_to_the_previous_one(runs) -> None:
    directory = runs.root / "corrupt"
    shutil.copytree(runs.root / "reference", directory)
    newest = directory / "checkpoints" / "step_00000008"
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    outcome = train(runs.config, 2, f"run.directory={directory}")
    assert outcome.codes == [0, 0], outcome.output
    assert (
        f"{victim.name} has other content" in outcome.output
        and "to step_00000008.damaged" in outcome.output
        and "at step 6" in outcome.output
    )
    assert (
        newest.exists() and (directory / "checkpoints" / "step_00000008.damaged" / victim.name).read_bytes() == content
    )
    assert runs.curve(directory) == runs.reference


def test_no_valid_checkpoint_is_an_error(runs) -> None:
    directory = runs.root / "lost"
    shutil.copytree(runs.root / "reference", directory)
    for checkpoint in (directory / "checkpoints").glob("step_*"):
        (checkpoint / ".metadata").unlink()
    outcome = train(runs.config, 2, f"run.directory={directory}")
    assert (
        outcome.codes[0] == 2
        and "error: rank 0: " in outcome.output
        and "none of its 2 checkpoints is whole" in outcome.output
    ), outcome.output
    assert runs.curve(directory) == runs.reference, "written metrics are kept"


def test_changed_configuration_needs_accept_changes(runs) -> None:
    directory = runs.root / "changed"
    shutil.copytree(runs.root / "reference", directory)
    changed = (f"run.directory={directory}", "train.steps=9", "log.every_steps=2")
    outcome = train(runs.config, 1, *changed)
    assert outcome.codes == [2] and "changes the mathematics: train.steps: was 8, is 9" in outcome.output, (
        outcome.output
    )
    assert "safe: log.every_steps: was 1, is 2" in outcome.output and "checkpoint.accept_changes" in outcome.output
    assert "steps: 8" in (directory / "config.yaml").read_text(), "a refused configuration is not recorded"
    outcome = train(runs.config, 1, *changed, "checkpoint.accept_changes=true")
    assert outcome.codes == [0] and runs.curve(directory)[:8] == runs.reference and len(runs.curve(directory)) == 9, (
        outcome.output
    )
    [record] = lines(directory / "config_changes.jsonl")
    assert record["step"] == 8 and "train.steps: was 8, is 9" in record["changes"]


def test_one_rank_with_another_configuration_or_code_is_named(runs) -> None:
    directory = runs.root / "unequal"
    outcome = train(
        runs.config,
        3,
        f"run.directory={directory}",
        "train.global_batch_size=6",
        only={1: ("optim.learning_rate=0.002",)},
    )
    assert set(outcome.codes) <= {2, -15} and "Traceback" not in outcome.output, outcome.output
    assert re.search(
        r"error: rank 0: not all ranks started the same: "
        r"optim.learning_rate is 0.002 on rank 1 \(.*\), 0.001 on 2 others",
        outcome.output,
    )
    outcome = train(runs.config, 3, f"run.directory={directory}", "train.global_batch_size=6", faults="other_code:2:0")
    assert set(outcome.codes) <= {2, -15} and re.search(
        r"the same: code is 0123456789ab on rank 2 \(.*\), [0-9a-f]{12} on 2 others\.", outcome.output
    )
    assert analyze_exit(directory).code == 2, "a supervisor must not restart this run"
    outcome = train(runs.config, 3, f"run.directory={directory}")
    assert (
        set(outcome.codes) <= {2, -15}
        and "train.global_batch_size 4 is not a multiple of" in outcome.output
        and analyze_exit(directory).code == 2
    ), outcome.output
    assert not (directory / "metrics.jsonl").exists() and not (directory / "checkpoints").exists()
