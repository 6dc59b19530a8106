"""Preset files: sections of a configuration that are written as a name, as in `language: qwen2.5_7b`.

A field whose type is annotated with `PRESET` accepts a name. `NAME.yaml` is looked up in the folder of the file that
names it, then in `models/KIND/` and `models/` beside that file and beside each parent folder, nearest first. KIND is
the field's own name: vision, projector or language.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

from megatron_share4v.errors import ConfigError

FOLDER = "models"
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Preset:
    """Mark of a section that may be written as the name of a preset file, for loading and for the JSON schema."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of a section, or of a string."""
        name = {"type": "string", "description": f"name of a preset in {FOLDER}/, or path of a YAML file"}
        return {"anyOf": [handler(schema), name]}


PRESET = Preset()


def is_name(text: str) -> bool:
    """Return whether `text` names a preset; a path has a folder or ends with .yaml."""
    return os.sep not in text and not text.endswith(SUFFIXES)


def find_preset(name: str, kind: str, *, folder: Path, opened: Sequence[Path] = ()) -> Path:
    """Return the nearest file of the preset `name`, seen from `folder`; files in `opened` are passed over.

    ConfigError with the nearest names and the folders searched when there is none.
    """
    folders = list(dict.fromkeys(_folders(folder, kind)))
    files = [path for place in folders if (path := place / f"{name}{SUFFIXES[0]}").is_file()]
    for path in files:
        if path.resolve() not in opened:
            return path
    if files:
        chain = " -> ".join(path.name for path in (*opened, files[0]))
        raise ConfigError(f"the preset {name!r} cannot be its own base ({chain})")
    raise ConfigError(
        f"there is no preset {name!r}; {_suggestion(name, kind, folders[1:])} "
        f"(searched for {name}{SUFFIXES[0]} in {', '.join(map(str, folders))})"
    )


def _suggestion(name: str, kind: str, folders: Sequence[Path]) -> str:
    own = [place for place in folders if place.name == kind]  # others hold whole models as well
    known = sorted({path.stem for place in own for path in place.glob(f"*{SUFFIXES[0]}")})
    near = get_close_matches(name, known, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if known:
        return f"known names: {', '.join(known)}"
    return (
        f"write a section of `key: value` lines, or a path that ends with {SUFFIXES[0]}, as of the presets in this "
        f"project's examples/{FOLDER}/{kind}/"
    )


def _folders(folder: Path, kind: str) -> Iterator[Path]:
    """Iterate over the existing folders that may hold presets, nearest first, the folder itself before all."""
    yield folder
    whole = Path(os.path.abspath(folder))
    for parent in (whole, *whole.parents):
        for place in (parent / FOLDER / kind, parent / FOLDER):
            if place.is_dir():
                yield place if folder.is_absolute() else Path(os.path.relpath(place))
