"""Find the vision tower of a model: among its weights, in a folder beside them, or where its config.json names it.

The same configuration fits OpenAI's CLIP and every fine-tuned tower, so a wrong one would change the outputs silently:
towers that are named or lie in the model's own directory are distinguished from guesses, and two of them need a choice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_share4v.checkpoint.hf.config import CONFIG, HfConfig
from megatron_share4v.checkpoint.hf.naming import TOWERS, component_of, find_tower_tensor
from megatron_share4v.checkpoint.hf.source.hub_cache import cached_sibling, model_name
from megatron_share4v.checkpoint.hf.source.reader import has_weights
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, LazyTensors
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger

TOWER_FOLDERS = ("clip", "vision_tower")
UseTower = Literal["inside", "folder"]
# Stage 1 of ShareGPT4V trained the tower and published it apart; the config.json of the language model still names
# OpenAI's, from which it started.
_STAGE_1 = re.compile(r"(ShareGPT4V-\d+B_Pretrained_vit-large336-l12)_vicuna-.+")


@dataclass(frozen=True, kw_only=True)
class TowerQuestion:
    """Where a model's tower is searched, and what the user chose."""

    directory: Path
    config: HfConfig
    given: Path | None = None
    """Directory given with --tower."""
    use: UseTower | None = None
    """Choice between a tower among the model's weights and one in a folder."""
    any_tower: bool = False

    @property
    def named(self) -> str | None:
        """Name or path of the tower that the model was trained with; None when unknown."""
        stage_1 = _STAGE_1.fullmatch(model_name(self.directory))
        return f"Lin-Chen/{stage_1[1]}" if stage_1 else self.config.tower

    @property
    def is_start(self) -> bool:
        """Whether config.json names the tower that training started from, and the trained one is another."""
        return self.config.tower_trained is not None and self.named == self.config.tower


def find_tower(question: TowerQuestion, tensors: LazyTensors) -> tuple[Path | None, dict[str, LazyTensor]]:
    """Return the folder that describes the tower, and the tensors without a tower that was not chosen.

    The folder has the tower's weights unless they are among the tensors; None when nothing describes those. Raises
    ConversionError for a missing tower, for another one than the model names, and for two without a choice.
    """
    inside = find_tower_tensor(tensors)
    if question.use == "inside" and inside is None:
        raise ConversionError(f"{question.directory}: has no vision tower among its weights; leave --use-tower out")
    if question.given is not None:
        _check_given(question, question.given)
    sure, guesses = _candidates(question)
    levels = [*sure, guesses] if inside is None or question.use == "folder" else sure
    full = next((found for level in levels if (found := _with_weights(level))), [])
    if inside is not None and full and question.use is None:
        raise ConversionError(
            f"two towers: {inside} inside {question.directory}, and another in {full[0]}; choose with --use-tower "
            "inside or --use-tower folder, or leave one of them out"
        )
    if inside is not None and question.use != "folder":
        described = [path for level in (*sure, guesses) for path in level if (path / CONFIG).is_file()]
        return (described[0] if described else None), dict(tensors)
    if not full:
        raise ConversionError(_missing(question))
    if len(full) > 1:
        raise ConversionError(f"two towers: in {full[0]} and in {full[1]}; choose one with --tower")
    get_logger().info("tower: %s", full[0])
    return full[0], {name: tensor for name, tensor in tensors.items() if component_of(name) != "vision"}


def drop_ungathered_tower(tensors: LazyTensors, *, directory: Path) -> dict[str, LazyTensor]:
    """Leave out a tower whose tensors are all empty: DeepSpeed ZeRO-3 saves frozen weights so.

    Buffers among them go too. Other empty tensors stay.
    """
    tower = {name: tensor for name, tensor in tensors.items() if component_of(name) == "vision"}
    empty = [name for name, tensor in tower.items() if 0 in tensor.shape]
    if not empty or any(name not in empty and not name.endswith("position_ids") for name in tower):
        return dict(tensors)
    get_logger().warning(
        "%s: its %d tower tensors are empty, as DeepSpeed ZeRO-3 saves frozen weights; the tower comes from elsewhere",
        directory,
        len(empty),
    )
    return {name: tensor for name, tensor in tensors.items() if name not in tower}


def _check_given(question: TowerQuestion, tower: Path) -> None:
    if not (tower / CONFIG).is_file():
        raise ConversionError(
            f"{tower}: is no tower (no {CONFIG}); give the directory of a CLIPVisionModel, SiglipVisionModel or "
            "Dinov2Model"
        )
    named = question.named
    if named is None or question.any_tower:
        return
    if question.is_start:
        if model_name(tower) == model_name(named):
            raise ConversionError(
                f"{tower}: is the tower that training started from ({question.config.tower_trained} is true in "
                f"{question.directory / CONFIG}); give the trained one, or use --any-tower to accept this one"
            )
        return
    paths = (Path(named), question.directory / named, question.directory.parent / model_name(named))
    if model_name(tower) != model_name(named) and not any(tower.resolve() == path.resolve() for path in paths):
        raise ConversionError(
            f"{tower}: another tower than the model's, which was trained with {named} (by {_source(question)}); "
            "give that one, or use --any-tower to accept this one"
        )


def _candidates(question: TowerQuestion) -> tuple[list[list[Path]], list[Path]]:
    """Return the directories that are surely meant for this model, by falling precedence, and the guesses."""
    directory, named = question.directory, question.named
    if question.given is not None:
        return [[question.given]], []
    beside = [directory / name for name in TOWER_FOLDERS]
    if named is None or question.is_start:
        return [beside], []
    if (directory / named / CONFIG).is_file():  # also when the name is an absolute path
        return [beside, [directory / named]], []
    cached = cached_sibling(directory, named)
    return [beside], [Path(named), directory.parent / model_name(named), *([cached] if cached is not None else [])]


def _with_weights(paths: Sequence[Path]) -> list[Path]:
    """Return the distinct directories that have a tower's configuration and weights."""
    full = [path for path in paths if (path / CONFIG).is_file() and has_weights(path)]
    return list({path.resolve(): path for path in full}.values())


def _source(question: TowerQuestion) -> str:
    if question.named == question.config.tower:
        return str(question.directory / CONFIG)
    return f"its name; its {CONFIG} still names {question.config.tower}, from which it started"


def _missing(question: TowerQuestion) -> str:
    if question.is_start:
        return (
            f"{question.directory}: missing tensor: {TOWERS[0]}: its vision tower was trained "
            f"({question.config.tower_trained} is true in {CONFIG}) and is not here; {question.config.tower} is what "
            "it started from. Give the trained one with --tower"
        )
    named = f" (trained with {question.named}, by {_source(question)})" if question.named else ""
    return (
        f"{question.directory}: missing tensor: {TOWERS[0]}: has no vision tower{named}; "
        "give its directory with --tower"
    )
