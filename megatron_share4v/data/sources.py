"""Reads annotation files: LLaVA/ShareGPT4V JSON, a list of {"id", "image"?, "conversations": [{"from", "value"}]}.

An entry is what the file holds at one position, unchecked; a record is an entry that has the right form. The two are apart
so that one bad entry can be named and refused without stopping. Roles' order, placeholders and images are checked by others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.data.sample import Turn
from megatron_share4v.errors import DataError

ROLES = ("human", "gpt")
TEXT_ONLY = "text-only"


@dataclass(frozen=True)
class Entry:
    """What `file` holds at `position` (counted from 0)."""

    file: str
    position: int
    content: object

    @property
    def where(self) -> str:
        """For messages: file, position and, where there is one, the id."""
        name = self.content.get("id") if isinstance(self.content, dict) else None
        return f"{self.file}, record {self.position}" + (f" (id {name!r})" if name is not None else "")


@dataclass(frozen=True)
class Record:
    """One conversation; `image` is a path relative to the image folder, None for text only."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


def read_entries(path: Path) -> list[Entry]:
    """All entries of an annotation file. Raises DataError when it is not there or not a JSON list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"annotations {path}: cannot be read ({error.strerror}); give the path of a LLaVA/ShareGPT4V JSON file") from error
    except ValueError as error:
        raise DataError(f"annotations {path}: not JSON ({error}); expected a list of records with 'conversations'") from error
    if not isinstance(content, list):
        raise DataError(f"annotations {path}: holds a JSON {type(content).__name__}; expected a list of records with 'conversations'")
    return [Entry(file=path.name, position=position, content=item) for position, item in enumerate(content)]


def parse_record(content: object, *, where: str) -> Record:
    """Check the form of one record; `where` opens the message of a DataError."""
    if not isinstance(content, dict):
        raise DataError(f"{where}: is a {type(content).__name__}; expected an object with 'conversations'")
    image = content.get("image")
    if "image" in content and not (isinstance(image, str) and image):
        raise DataError(f"{where}: 'image' is {image!r}; expected one relative path, or no 'image' at all for text only")
    conversations = content.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: 'conversations' is {_short(conversations)}; expected a list of {{'from', 'value'}}")
    turns = tuple(_parse_turn(item, where=f"{where}, turn {number}") for number, item in enumerate(conversations))
    return Record(id=str(content.get("id") or ""), image=image, turns=turns)


def source_of(content: object) -> str:
    """The collection that a record belongs to: the first folder of its image path ("coco", "sam", ...), or TEXT_ONLY."""
    image = content.get("image") if isinstance(content, dict) else None
    if not isinstance(image, str):
        return TEXT_ONLY
    parts = Path(image).parts
    return parts[0] if len(parts) > 1 else "."


def word_count(turns: tuple[Turn, ...]) -> int:
    """Whitespace words over all turns: LLaVA's measure of length for group_by_modality_length."""
    return sum(len(turn.text.split()) for turn in turns)


def _parse_turn(item: object, *, where: str) -> Turn:
    role, text = (item.get("from"), item.get("value")) if isinstance(item, dict) else (None, None)
    if role not in ROLES:
        raise DataError(f"{where}: 'from' is {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise DataError(f"{where}: 'value' is {_short(text)}; expected text")
    return Turn(role=role, text=text)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
