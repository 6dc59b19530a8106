"""Configuration changes since a checkpoint: every key has an effect, and mathematics changes need explicit consent."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_share4v.checkpoint.config_diff import ConfigChange, check_config_changes, diff_config, format_changes
from megatron_share4v.config.load import dump, flat, load_run
from megatron_share4v.errors import CheckpointError

BASE = ["run.directory=a", "data.train=d", "data.tokenizer=t", "train.global_batch_size=8", "train.steps=100"]


@pytest.fixture
def found(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("")

    def found(*overrides: str, before: tuple[str, ...] = ()) -> list[ConfigChange]:
        old, new = (load_run(tmp_path / "run.yaml", [*BASE, *before, *values]) for values in ((), overrides))
        return diff_config(dump(old), new)

    return found


@pytest.mark.parametrize(
    ("override", "effect"),
    [
        ("run.directory=b", "safe"),
        ("parallel.tensor=2", "safe"),
        ("checkpoint.every_steps=7", "safe"),
        ("train.micro_batch_size=2", "safe"),
        ("optim.learning_rate=1e-3", "mathematics"),
        ("schedule.kind=linear", "mathematics"),
        ("precision.dtype=fp32", "mathematics"),
        ("train.steps=200", "mathematics"),
        ("data.image_backend=torch_u8", "mathematics"),
        ("data.train=other", "data"),
        ("run.seed=3", "data"),
        ("train.global_batch_size=16", "refused"),
        ("model.language.num_layers=2", "refused"),
        ("model.trainable.language=false", "refused"),
    ],
)
def test_effects(found, override: str, effect: str) -> None:
    [change] = found(override)
    assert change.key == override.partition("=")[0] and change.effect == effect


def test_effects_that_depend_on_other_values(found) -> None:
    constant = ("schedule.kind=constant", "schedule.warmup_steps=3")
    [longer] = found("train.steps=200", before=constant)
    assert longer.effect == "safe", "the rate of each step stays"
    averaged = ("loss.normalize=microbatch", "train.micro_batch_size=2")
    [cut] = found("train.micro_batch_size=4", before=averaged)
    assert cut.effect == "mathematics"


def test_every_key_of_the_configuration_has_an_effect_on_purpose(found, tmp_path: Path) -> None:
    """Lists the keys that match no pattern on purpose and therefore count as mathematics."""
    from megatron_share4v.checkpoint.config_diff import _effect

    config = load_run(tmp_path / "run.yaml", BASE)
    keys = [key for key in flat(config) if _effect(key, config) == "mathematics"]
    sections = {key.split(".")[0] for key in keys} - {"optim", "schedule", "loss", "precision"}
    assert sections == {"train", "data"}, keys
    bad_steps = {f"train.bad_steps.{name}" for name in ("loss_factor", "gradient_factor", "window")}
    assert {key for key in keys if key.startswith(("train.", "data."))} == {
        "train.steps",
        "train.epochs",
        "data.image_backend",
    } | bad_steps


def test_a_yes_is_needed_for_mathematics_and_does_not_help_where_refused(found) -> None:
    changed = found("optim.learning_rate=1e-3", "log.every_steps=5", "data.train=other")
    with pytest.raises(CheckpointError) as error:
        check_config_changes(changed, where="step_1", accepted=False)
    assert str(error.value).splitlines() == [
        "step_1: was trained with other settings:",
        "  changes the mathematics: optim.learning_rate: was 2e-05, is 0.001",
        "  data, compared by content: data.train: was 'd', is 'other'",
        "  safe: log.every_steps: was 1, is 5",
        "Restore the old values, or set checkpoint.accept_changes true to continue with the new ones",
    ]
    check_config_changes(changed, where="step_1", accepted=True)
    refused = found("optim.learning_rate=1e-3", "train.global_batch_size=16")
    with pytest.raises(
        CheckpointError, match="another global batch:\n  cannot be changed: train.global_batch_size: was 8, is 16"
    ):
        check_config_changes(refused, where="step_1", accepted=True)
    check_config_changes(found("log.every_steps=5"), where="step_1", accepted=False)


def test_keys_of_another_version_are_left_out(found, tmp_path: Path) -> None:
    config = load_run(tmp_path / "run.yaml", BASE)
    older = dump(config).replace("  weight_decay: 0.0\n", "").replace("optim:\n", "optim:\n  forgotten: 3\n")
    assert older != dump(config) and diff_config(older, config) == [] and format_changes([]) == ""
