"""Compare a run's configuration with the one stored in its checkpoint, and classify the effect of every changed key.

safe: another layout, log or file; sums may round differently. mathematics: another optimisation, allowed with
checkpoint.accept_changes. refused: the checkpoint cannot be resumed with it. data: compared by content, not by key, in
data/sampling/fingerprint.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import yaml

from megatron_share4v.config.load import flat, leaves
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import CheckpointError

Effect = Literal["safe", "mathematics", "refused", "data"]

# The first matching pattern decides; a key without one counts as mathematics, so that a new key is not accepted by
# mistake.
EFFECTS: tuple[tuple[str, Effect], ...] = (
    ("model.language.max_position_embeddings", "safe"),
    ("model.*", "refused"),
    ("train.global_batch_size", "refused"),
    ("run.seed", "data"),
    ("run.*", "safe"),
    ("parallel.*", "safe"),
    ("ops", "safe"),
    ("attention", "safe"),
    ("transformer_engine", "safe"),
    ("precision.guard_*", "safe"),
    ("optim.offload", "safe"),
    ("checkpoint.*", "safe"),
    ("watch.*", "safe"),
    ("log.*", "safe"),
    ("train.validat*", "safe"),
    ("train.preview_*", "safe"),
    ("train.recompute*", "safe"),
    ("train.bad_steps.samples", "safe"),
    ("train.bad_steps.in_a_row", "safe"),
    ("train.bad_steps.then", "safe"),
    ("data.validation", "safe"),
    ("data.num_workers", "safe"),
    ("data.prefetch", "safe"),
    ("data.worker_timeout_s", "safe"),
    ("data.max_faulty_fraction", "safe"),
    ("data.pad_multiple", "safe"),
    ("data.pad_to", "safe"),
    ("data.image_backend", "mathematics"),
    ("data.*", "data"),
)


@dataclass(frozen=True)
class ConfigChange:
    """A key whose value differs from the checkpoint's."""

    key: str
    before: Any
    now: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key}: was {self.before!r}, is {self.now!r}"


def diff_config(before: str, config: RunConfig) -> list[ConfigChange]:
    """List the keys whose value in `config` differs from `before`, the YAML text of a checkpoint's configuration.

    Keys that only one of the two has are ignored: another version of the project wrote them.
    """
    old, new = dict(leaves(yaml.safe_load(before))), flat(config)
    return [
        ConfigChange(key, old[key], new[key], _effect(key, config))
        for key in new
        if key in old and old[key] != new[key]
    ]


def format_changes(found: Sequence[ConfigChange]) -> str:
    """Format changes as one line per key, grouped by effect."""
    words = {
        "refused": "cannot be changed",
        "mathematics": "changes the mathematics",
        "data": "data, compared by content",
        "safe": "safe",
    }
    lines = [f"\n  {word}: {change}" for effect, word in words.items() for change in found if change.effect == effect]
    return "".join(lines)


def check_config_changes(found: Sequence[ConfigChange], *, where: object, accepted: bool) -> None:
    """Raise CheckpointError for refused changes, and mathematics changes unless checkpoint.accept_changes is set."""
    effects = {change.effect for change in found}
    if "refused" in effects:
        raise CheckpointError(
            f"{where}: cannot be resumed with another model, other trained parts or another global batch:"
            f"{format_changes(found)}\n"
            "Restore the old values, or start another run.directory from its weights with checkpoint.initialize_from"
        )
    if "mathematics" in effects and not accepted:
        raise CheckpointError(
            f"{where}: was trained with other settings:{format_changes(found)}\n"
            "Restore the old values, or set checkpoint.accept_changes true to continue with the new ones"
        )


def _effect(key: str, config: RunConfig) -> Effect:
    if key in ("train.steps", "train.epochs"):
        schedule = config.schedule
        keeps_rate = schedule.kind == "constant" and (schedule.warmup_steps is not None or schedule.warmup_ratio == 0)
        return "safe" if keeps_rate else "mathematics"
    if key == "train.micro_batch_size":
        return "safe" if config.loss.normalize == "tokens" else "mathematics"
    return next((effect for pattern, effect in EFFECTS if fnmatch(key, pattern)), "mathematics")
