"""Whether a checkpoint is of the model that a configuration describes: what a stage starts from, and what a comparison compares.

Shapes alone do not tell: another feature layer, epsilon or rotary base gives other answers from the same tensors. Nor does the configuration tell
everything: OpenAI's CLIP and a tower that was tuned from it have the same one. The hash of the tower's weights tells them apart.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from megatron_share4v.checkpoint.manifest import Manifest
from megatron_share4v.config.load import restore
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import CheckpointError

FREE = ("language.max_position_embeddings",)
"""May change from one stage to the next: it is a limit, no part of the computation."""


def stored_config(manifest: Manifest, *, where: Path) -> RunConfig:
    """The configuration that a checkpoint carries. Raises CheckpointError when this version cannot read it."""
    try:
        return restore(RunConfig, manifest.config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{where}: its configuration is of another version ({key}: {first['msg']}); use the version that wrote it: {manifest.versions}"
        ) from error


def model_differences(one: ModelConfig, other: ModelConfig) -> list[tuple[str, object, object]]:
    """(key, value of one, value of the other) where the computation differs."""
    found = []
    for section in ("vision", "projector", "language"):
        first, second = vars(getattr(one, section)), vars(getattr(other, section))
        found += [
            (f"{section}.{key}", first[key], second[key])
            for key in first
            if not key.startswith("_") and first[key] != second[key]
        ]
    return [difference for difference in found if difference[0] not in FREE]


def check_initial_model(
    manifest: Manifest, model: ModelConfig, *, where: Path, expect_tower: str | None = None
) -> None:
    """Raises CheckpointError when a run of `model` does not compute what the checkpoint's weights were trained for, or has another tower.

    expect_tower: SHA-256 of the tower's weights that the run asks for; None: any.
    """
    found = model_differences(model, stored_config(manifest, where=where).model)
    if found:
        what = "another tower" if all(key.startswith("vision.") for key, _, _ in found) else "another model"
        listed = "; ".join(f"model.{key} is {mine!r} here, {stored!r} in the checkpoint" for key, mine, stored in found)
        raise CheckpointError(
            f"{where}: is of {what} than this run's: {listed}; use its model section, or start from another checkpoint"
        )
    stored = manifest.weights.get("vision")
    if expect_tower is None or stored == expect_tower:
        return
    if stored is None:
        raise CheckpointError(
            f"{where}: does not state its tower's hash, which checkpoint.expect_tower asks for; look it up with `tools/convert.py inspect --hashes`, "
            "and leave checkpoint.expect_tower out if it is the right one"
        )
    raise CheckpointError(
        f"{where}: has another tower than checkpoint.expect_tower says: sha256 {stored}, expected {expect_tower}; start from the checkpoint that "
        "goes with it, or correct checkpoint.expect_tower"
    )
