"""Reader of YAML files, their `base:` files and dotted overrides into one tree that keeps the place of every value.

`base:` (a path or a list of paths, relative to its file) may stand at the top of a file or inside any section; the
other keys override it. The tree is validated by config/load.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import yaml

from megatron_share4v.files import read_text

BASE = "base"
COMMAND_LINE = "command line: "


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader (YAML 1.1), except that `2e-5` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Leaf:
    """A value with the `file:line` or override that set it."""

    value: Any
    place: str


@dataclass(frozen=True)
class Section:
    """A mapping with the place where it was last opened, by a file if any file did."""

    entries: dict[str, Section | Leaf]
    place: str

    def plain(self) -> dict[str, Any]:
        """Return the values as nested dicts."""
        return {
            key: entry.plain() if isinstance(entry, Section) else entry.value for key, entry in self.entries.items()
        }

    def has(self, path: Iterable[str]) -> bool:
        """Return whether a value was set at `path`."""
        here: Section | Leaf = self
        for key in path:
            if isinstance(here, Leaf) or key not in here.entries:
                return False
            here = here.entries[key]
        return True

    def place_of(self, path: Iterable[str]) -> str:
        """Return the place of the deepest part of `path` that was set."""
        here: Section | Leaf = self
        for key in path:
            if isinstance(here, Leaf) or key not in here.entries:
                break
            here = here.entries[key]
        return here.place


@overload
def merge(below: Section, above: Section) -> Section: ...


@overload
def merge(below: Section | Leaf, above: Section | Leaf) -> Section | Leaf: ...


def merge(below: Section | Leaf, above: Section | Leaf) -> Section | Leaf:
    """Merge two trees; `above` overrides `below`, key by key where both are sections."""
    if isinstance(below, Leaf) or isinstance(above, Leaf):
        return above
    entries = dict(below.entries)
    for key, entry in above.entries.items():
        entries[key] = merge(entries[key], entry) if key in entries else entry
    return Section(entries, below.place if above.place.startswith(COMMAND_LINE) else above.place)


@dataclass(frozen=True)
class _Source:
    """File or override being read: its name, the folder of relative bases, the chain of files whose bases led here."""

    name: str
    folder: Path
    opened: tuple[Path, ...] = ()
    numbered: bool = True

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.numbered else self.name


@dataclass
class Reader:
    """Reader of files and overrides; collects errors in `problems`, clears `complete` when a source is unreadable."""

    problems: list[str] = field(default_factory=list)
    complete: bool = True

    def read_file(self, path: Path, *, asked_at: str = "", opened: tuple[Path, ...] = ()) -> Section:
        """Read one file on top of its bases.

        `asked_at`: place of the `base:` that names it; `opened`: chain of files whose bases are being read.
        """
        name = os.path.normpath(path)
        where = f"{asked_at}: base: {name}" if asked_at else name
        if path.resolve() in opened:
            return self._unreadable(
                f"{where}: a file cannot be its own base ({' -> '.join(file.name for file in (*opened, path))})"
            )
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            return self._unreadable(f"{where}: cannot be read: {reason}")
        entry = self._parse(text, _Source(name, path.parent, (*opened, path.resolve())))
        if isinstance(entry, Leaf) and entry.value is not None:
            return self._unreadable(f"{name}: should hold `key: value` lines, holds {entry.value!r}")
        return Section(entry.entries if isinstance(entry, Section) else {}, name)

    def read_override(self, override: str) -> Section:
        """Read one `dotted.key=value`; the value is YAML, and a base in it is relative to the working directory."""
        source = _Source(COMMAND_LINE + override, Path(), numbered=False)
        key, equals, text = override.partition("=")
        *sections, last = key.strip().split(".")
        if not equals or not all((*sections, last)):
            self.problems.append(f"{source.name}: write dotted.key=value, for example train.steps=100")
            return Section({}, source.name)
        tree = self._with_bases({last: _at(self._parse(text, source), source.name)}, source.name, source)
        for section in reversed(sections):
            tree = Section({section: tree}, source.name)
        return tree

    def _unreadable(self, problem: str) -> Section:
        self.problems.append(problem)
        self.complete = False
        return Section({}, "")

    def _parse(self, text: str, source: _Source) -> Section | Leaf:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return Leaf(None, source.name) if node is None else self._entry(loader, node, source)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
            mark = getattr(error, "problem_mark", None)
            place = f"{source.name}:{mark.line + 1}" if mark and source.numbered else source.name
            return self._unreadable(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}")
        finally:
            loader.dispose()

    def _entry(self, loader: _Loader, node: yaml.Node, source: _Source) -> Section | Leaf:
        if not isinstance(node, yaml.MappingNode):
            return Leaf(loader.construct_object(node, deep=True), source.place(node))
        entries: dict[str, Section | Leaf] = {}
        for key_node, value_node in node.value:
            key, place = str(key_node.value), source.place(key_node)
            if key in entries:
                self.problems.append(f"{place}: {key}: written twice, first at {entries[key].place}")
            entries[key] = _at(self._entry(loader, value_node, source), place)
        return self._with_bases(entries, source.place(node), source)

    def _with_bases(self, entries: dict[str, Section | Leaf], place: str, source: _Source) -> Section:
        base = entries.get(BASE, Leaf([], place))
        paths = base.value if isinstance(base, Leaf) else base.plain()
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            return self._unreadable(f"{base.place}: {BASE}: should be a path or a list of paths, got {paths!r}")
        section = Section({}, place)
        for path in paths:
            section = merge(
                section,
                self.read_file(source.folder / Path(path).expanduser(), asked_at=base.place, opened=source.opened),
            )
        return merge(section, Section({key: entry for key, entry in entries.items() if key != BASE}, place))


def _at(entry: Section | Leaf, place: str) -> Section | Leaf:
    """Return the entry with the place of its key."""
    return replace(entry, place=place)
