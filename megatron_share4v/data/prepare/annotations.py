"""Streaming reader of LLaVA/ShareGPT4V annotations: a JSON list of {"id", "image"?, "conversations": [...]}.

JSON Lines, one record a line, are read as well, whatever the file's name.

An Entry is the unchecked element at one position; a Record is an entry of valid form. They are separate so that one bad
entry can be named and rejected without stopping. Role order, placeholders and images are checked in validate.py.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_share4v.data.images.file_kind import SAMPLE, describe_file
from megatron_share4v.data.prepare.record_keys import IMAGE, image_path, is_empty, shorten
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import DataError
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

ROLES = ("human", "gpt")
TEXT_ONLY = "text-only"
CHUNK_BYTES = 1 << 20
MAX_RECORD = 64 << 20  # characters
REMEDY = "give the path of a LLaVA/ShareGPT4V JSON file"
LONGEST_TOKEN = 16  # characters of a literal, number or escape that the end of a chunk may cut
_LONGEST_PATH = 4096  # characters that an operating system takes
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Entry:
    """Unchecked element of `file` at `position` (from 0)."""

    file: str
    position: int
    content: object

    @property
    def where(self) -> str:
        """File, position and, if present, the id, for messages."""
        name = self.content.get("id") if isinstance(self.content, dict) else None
        return f"{self.file}, record {self.position}" + (f" (id {name!r})" if name is not None else "")


@dataclass(frozen=True)
class Record:
    """One conversation; `image` is a path relative to the image folder, None for text only."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


class AnnotationFile:
    """Annotation file, read record by record in bounded memory. Each iteration starts at the beginning."""

    def __init__(self, path: Path) -> None:
        """Raise DataError when the file cannot be read."""
        self.path = path
        self.bytes_read = 0
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise DataError(f"annotations {path}: cannot be read ({error.strerror}); {REMEDY}") from error

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries in order. Raises DataError where the file is not a JSON list."""
        for position, content in enumerate(_elements(self)):
            yield Entry(file=self.path.name, position=position, content=content)

    def chunks(self) -> Iterator[str]:
        """Yield the text of the file in chunks; `bytes_read` counts what was read. Raises DataError."""
        self.bytes_read = 0
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    self.bytes_read += len(chunk)
                    yield decoder.decode(chunk)
                yield decoder.decode(b"", final=True)
        except OSError as error:
            raise DataError(f"annotations {self.path}: cannot be read ({error.strerror}); {REMEDY}") from error
        except UnicodeDecodeError as error:
            reason = self.describe() or f"not UTF-8 before byte {self.bytes_read}: {error}"
            raise DataError(
                f"annotations {self.path}: not JSON ({reason}); save it as UTF-8, or download the file again"
            ) from error

    def describe(self) -> str | None:
        """Say what a file that is no JSON is by its first bytes; None for text and unknown kinds."""
        with self.path.open("rb") as file:
            kind = describe_file(file.read(SAMPLE))
        return None if kind in ("text", "JSON text") else kind


@dataclass
class _TextWindow:
    """Unparsed part of the text that has been read so far."""

    chunks: Iterator[str]
    text: str = ""
    start: int = 0
    ended: bool = False

    def grow(self, *, least: int = 1) -> None:
        """Drop the parsed text, and read at least `least` more characters, or to the end."""
        parts = [self.text[self.start :]]
        self.start = 0
        while least > 0 and not self.ended:
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            parts.append(chunk or "")
            least -= len(parts[-1])
        self.text = "".join(parts)

    def skip_space(self) -> str:
        """Advance to the next character that is not white space, and return it; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.start)
            assert match is not None  # the pattern matches the empty string
            self.start = match.end()
            if self.start < len(self.text) or self.ended:
                return self.text[self.start : self.start + 1]
            self.grow()


def _elements(annotations: AnnotationFile) -> Iterator[object]:
    """Yield the elements of the JSON list."""
    window = _TextWindow(annotations.chunks())
    first = window.skip_space()
    if first == "{":
        yield from _lines(window, annotations.path)
        return
    if first != "[":
        found = "is empty" if not first else f"is {annotations.describe() or 'no JSON list'}"
        raise DataError(
            f"annotations {annotations.path}: {found}; expected a JSON list of records with 'conversations'"
        )
    window.start += 1
    count, mark = 0, window.skip_space()
    while mark != "]":
        yield _element(window, annotations.path, count)
        count += 1
        mark = window.skip_space()
        if mark == ",":
            window.start += 1
            if window.skip_space() == "]":
                raise _not_json(annotations.path, count, "a comma before the end of the list")
        elif mark != "]":
            raise _not_json(
                annotations.path, count, f"{mark!r} where a comma should be" if mark else "the file ends early"
            )
    window.start += 1
    if rest := window.skip_space():
        raise _not_json(annotations.path, count, f"{rest!r} after the end of the list")


def _lines(window: _TextWindow, path: Path) -> Iterator[object]:
    """Yield the records of JSON Lines. Raises DataError for a single object that is no record."""
    count = 0
    while mark := window.skip_space():
        if mark != "{":
            raise _not_json(path, count, f"{mark!r} after a record; JSON Lines have one object a line")
        record = _element(window, path, count)
        assert isinstance(record, dict)  # it begins with {
        if not count and not window.skip_space() and "conversations" not in record:
            keys = ", ".join(list(record)[:5])
            raise DataError(
                f"annotations {path}: holds a JSON object ({keys}); expected a list of records with 'conversations', "
                "or JSON Lines, one record a line"
            )
        yield record
        count += 1


def _element(window: _TextWindow, path: Path, count: int) -> object:
    """Parse one element, reading on while it is incomplete."""
    decoder = json.JSONDecoder()
    while True:
        try:
            content, end = decoder.raw_decode(window.text, window.start)
            # A number may continue in the next chunk; an element with a closing mark cannot.
            if window.ended or isinstance(content, (dict, list, str)) or end + LONGEST_TOKEN < len(window.text):
                window.start = end
                return content
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated string") or error.pos > len(window.text) - LONGEST_TOKEN
            if window.ended or not is_cut:
                raise _not_json(path, count, error.msg) from error
        except RecursionError as error:
            raise _not_json(path, count, "nested too deeply") from error
        except ValueError as error:  # Python's limit on the digits of an integer; its advice is for programmers
            raise _not_json(path, count, str(error).partition(";")[0]) from error
        length = len(window.text) - window.start
        if length > MAX_RECORD:
            raise _not_json(path, count, f"a record longer than {MAX_RECORD} characters")
        window.grow(least=length)


def _not_json(path: Path, count: int, what: str) -> DataError:
    return DataError(
        f"annotations {path}: not JSON after {count} records ({what}); download the file again, or repair it"
    )


def parse_record(content: object, *, where: str) -> Record:
    """Validate the form of one record; messages of the DataError start with `where`."""
    if not isinstance(content, dict):
        raise DataError(f"{where}: is a {type(content).__name__}; expected an object with 'conversations'")
    image = image_path(content)
    if IMAGE in content and image is None and not is_empty(content[IMAGE]):
        raise DataError(
            f"{where}: 'image' is {shorten(content[IMAGE])}; expected one relative path, or no 'image' for text only"
        )
    if image is not None:
        _check_path(image, where=where)
    conversations = content.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: 'conversations' is {shorten(conversations)}; expected a list of {{'from', 'value'}}")
    turns = tuple(_parse_turn(item, where=f"{where}, turn {number}") for number, item in enumerate(conversations, 1))
    if IMAGE in content and image is None and any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        raise DataError(
            f"{where}: 'image' is {content[IMAGE]!r} and a turn has {IMAGE_PLACEHOLDER}; expected one relative path, "
            f"or no {IMAGE_PLACEHOLDER} for text only"
        )
    return Record(id=str(content.get("id") or ""), image=image, turns=turns)


def _check_path(image: str, *, where: str) -> None:
    """Raise DataError for a path that is not below the folder of images, and for an image in the record itself."""
    if image.startswith("data:") or len(image) > _LONGEST_PATH:
        raise DataError(
            f"{where}: 'image' is {shorten(image)}, {len(image)} characters; expected a relative path: write the image "
            "to a file"
        )
    if "://" in image:
        raise DataError(f"{where}: 'image' is {shorten(image)}, a URL; download the picture and give its path")
    if image.startswith("/") or PurePosixPath(os.path.normpath(image)).parts[:1] == ("..",):
        raise DataError(
            f"{where}: 'image' is {shorten(image)}, outside the folder of images; write a path relative to it"
        )
    if ".." in PurePosixPath(image).parts:
        raise DataError(f"{where}: 'image' is {shorten(image)}; write it without '..': {os.path.normpath(image)}")


def source_name(content: object) -> str:
    """Source of a record: the first folder of its image path ("coco", "sam", ...), or TEXT_ONLY."""
    image = image_path(content)
    if image is None:
        return TEXT_ONLY
    parts = Path(image).parts
    return parts[0] if len(parts) > 1 else "."


def count_words(turns: tuple[Turn, ...]) -> int:
    """Count whitespace-separated words over all turns: LLaVA's length for group_by_modality_length."""
    return sum(len(turn.text.split()) for turn in turns)


def _parse_turn(item: object, *, where: str) -> Turn:
    role, text = (item.get("from"), item.get("value")) if isinstance(item, dict) else (None, None)
    if role not in ROLES:
        raise DataError(f"{where}: 'from' is {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise DataError(f"{where}: 'value' is {shorten(text)}; expected text")
    return Turn(role=role, text=text)
