"""Benchmark files: required files, paths below --data, download sources, and readers with precise errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_share4v.errors import DataError
from megatron_share4v.files import read_text

Row = dict[str, Any]


@dataclass(frozen=True)
class RequiredFile:
    """A required file, or a folder when the name ends in a slash.

    names: possible paths below the benchmark folder, "{split}" is the split.

    source: where to get it. splits: splits that require it; empty for all.
    """

    key: str
    names: tuple[str, ...]
    source: str
    splits: tuple[str, ...] = ()


class BenchmarkFolder:
    """Folder of one benchmark with all required files: folder["questions"] is a path."""

    def __init__(self, data: Path, *, official: str, needs: Sequence[RequiredFile], split: str) -> None:
        """Locate all files.

        data: the folder itself, or the parent of all benchmarks under their official names. Raises DataError naming
        what is missing.
        """
        self.root = data / official if official and (data / official).is_dir() else data
        self.split = split
        self._needs = [need for need in needs if not need.splits or split in need.splits]
        self._paths = {need.key: path for need in self._needs if (path := self._find(need))}
        missing = [need for need in self._needs if need.key not in self._paths]
        if missing:
            names = "; ".join(f"{self.root / self._names(need)[0]} does not exist" for need in missing)
            raise DataError(f"{names}\n{self.layout}")

    def __getitem__(self, key: str) -> Path:
        return self._paths[key]

    @property
    def layout(self) -> str:
        """Expected files with their sources, as text; missing ones are marked."""
        lines = [f"expected below --data {self.root}:"]
        for need in self._needs:
            mark = "" if need.key in self._paths else "MISSING "
            lines.append(f"  {mark}{' or '.join(self._names(need))}: {need.source}")
        return "\n".join(lines)

    def image(self, name: object, key: str = "images") -> Path:
        """Path of an image in the folder `key`. Raises DataError when the file is not there."""
        path = self[key] / str(name)
        if not os.path.isfile(path):  # False for an unusable name as well
            raise DataError(f"image {path} does not exist\n{self.layout}")
        return path

    def _names(self, need: RequiredFile) -> list[str]:
        return [name.replace("{split}", self.split) for name in need.names]

    def _find(self, need: RequiredFile) -> Path | None:
        paths = [(self.root / name, name.endswith("/")) for name in self._names(need)]
        return next((path for path, is_folder in paths if (path.is_dir() if is_folder else path.is_file())), None)


def read_json(path: Path, kind: type) -> Any:
    """Read a whole JSON file whose content is of type `kind`. Raises DataError."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON ({error}); download it again") from error
    if not isinstance(content, kind):
        raise DataError(
            f"{path}: holds a JSON {type(content).__name__}, expected a {kind.__name__}; it is another file than the "
            "official one"
        )
    return content


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (file:line, object) for every non-empty line. Raises DataError."""
    try:
        lines = read_text(path).replace("\n\ufeff", "\n").split("\n")  # files with a mark may be joined
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: invalid JSON ({error}); expected one object per line") from error
            if not isinstance(content, dict):
                raise DataError(
                    f"{path}:{number}: is a JSON {type(content).__name__}; expected one object per line, without the "
                    "brackets and commas of a list"
                )
            yield f"{path}:{number}", content


OFFICIAL_REMEDY = "The file is damaged, or another than the official one"


def get_field(
    row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], *, where: str, remedy: str = OFFICIAL_REMEDY
) -> Any:
    """Return row[key]. Raises DataError, whose message ends with `remedy`, when it is missing or of another type."""
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        names = [each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,))]
        kinds = " or ".join(f"{'an' if name == 'int' else 'a'} {name}" for name in names)
        raise DataError(f"{where}: {key!r} is {str(value)[:60]!r}; expected {kinds}. {remedy}")
    return value


def require(row: Mapping[str, Any], *, where: str, **kinds: type | tuple[type, ...]) -> None:
    """Check that a row has fields of the given types. Raises DataError."""
    for key, kind in kinds.items():
        get_field(row, key, kind, where=where)
