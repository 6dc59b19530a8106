"""Compare the model configuration stored in a checkpoint with another one: a run that starts from it, or a converted
model.

Shapes do not identify a model: another feature layer, epsilon or rotary base computes other outputs from the same
tensors. OpenAI's CLIP and a vision tower fine-tuned from it have the same configuration; only the hash of the tower's
weights distinguishes them.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from megatron_share4v.checkpoint.manifest import Manifest
from megatron_share4v.config.load import restore
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import CheckpointError

IGNORED_KEYS = ("language.max_position_embeddings",)
"""Keys that may change between training stages: a limit on the input, not part of the computation."""


def stored_config(manifest: Manifest, *, where: Path) -> RunConfig:
    """Return the run configuration stored in a checkpoint. Raises CheckpointError when this version cannot read it."""
    try:
        return restore(RunConfig, manifest.config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{where}: its configuration is of another version ({key}: {first['msg']}); "
            f"use the version that wrote it: {manifest.versions}"
        ) from error


def model_differences(one: ModelConfig, other: ModelConfig) -> list[tuple[str, object, object]]:
    """List (key, value in `one`, value in `other`) for every key that changes the computation."""
    found = []
    for section in ("vision", "projector", "language"):
        first, second = vars(getattr(one, section)), vars(getattr(other, section))
        found += [
            (f"{section}.{key}", first[key], second[key])
            for key in first
            if not key.startswith("_") and first[key] != second[key]
        ]
    return [difference for difference in found if difference[0] not in IGNORED_KEYS]


def check_initial_model(
    manifest: Manifest, model: ModelConfig, *, where: Path, expect_tower: str | None = None
) -> None:
    """Check that a run of `model` can start from a checkpoint's weights.

    `expect_tower` is the SHA-256 of the vision tower's weights that the run requires; None accepts any tower.
    Raises CheckpointError when the model configurations differ or the tower has another hash.
    """
    found = model_differences(model, stored_config(manifest, where=where).model)
    if found:
        what = "another tower" if all(key.startswith("vision.") for key, _, _ in found) else "another model"
        listed = "; ".join(f"model.{key} is {mine!r} here, {stored!r} in the checkpoint" for key, mine, stored in found)
        raise CheckpointError(
            f"{where}: is of {what} than this run's: {listed}; use its model section "
            f"(tools/convert.py inspect {where} prints it), or start from another checkpoint"
        )
    stored = manifest.weights.get("vision")
    if expect_tower is None or stored == expect_tower:
        return
    if stored is None:
        raise CheckpointError(
            f"{where}: does not state its tower's hash, which checkpoint.expect_tower requires; "
            "look it up with `tools/convert.py inspect --hashes`, and omit checkpoint.expect_tower if it matches"
        )
    raise CheckpointError(
        f"{where}: its tower is not the one of checkpoint.expect_tower: sha256 {stored}, expected {expect_tower}; "
        "start from the checkpoint with that tower, or correct checkpoint.expect_tower"
    )
