"""Reader of YAML files, their `base:` files and dotted overrides into one tree that keeps the place of every value.

`base:` (a path or a list of paths, relative to its file) may stand at the top of a file or inside any section; the
other keys override it. Sections in `Reader.presets` accept the name of a preset as their base, or as their whole value
(config/presets.py). The tree is validated by config/load.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import yaml

from megatron_share4v.config.presets import SUFFIXES, find_preset, is_name
from megatron_share4v.errors import ConfigError
from megatron_share4v.files import read_text

BASE = "base"
COMMAND_LINE = "command line: "
Keys = tuple[str, ...]


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
    """A mapping with the place where it was last opened, by a file if any file did.

    A `complete` section replaces another one instead of overriding some of its values; presets are complete.
    """

    entries: dict[str, Section | Leaf]
    place: str
    complete: bool = False

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
    """Merge two trees; `above` overrides `below`, key by key where both are sections and `above` is not complete."""
    if isinstance(below, Leaf) or isinstance(above, Leaf):
        return above
    entries = {} if above.complete else dict(below.entries)
    for key, entry in above.entries.items():
        entries[key] = merge(entries[key], entry) if key in entries else entry
    place = below.place if above.place.startswith(COMMAND_LINE) else above.place
    return Section(entries, place, below.complete or above.complete)


@dataclass(frozen=True)
class _Source:
    """File or override being read: its name, the folder of relative bases, the one from which presets are searched,
    the chain of files whose bases led here."""

    name: str
    folder: Path
    presets_from: Path
    opened: tuple[Path, ...] = ()
    numbered: bool = True

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.numbered else self.name


@dataclass
class Reader:
    """Reader of files and overrides; collects errors in `problems`, clears `complete` when a source is unreadable.

    `presets`: keys of the sections that may be written as the name of a preset.
    """

    presets: frozenset[Keys] = frozenset()
    problems: list[str] = field(default_factory=list)
    complete: bool = True

    def read_file(self, path: Path, *, keys: Keys = (), asked_at: str = "", opened: tuple[Path, ...] = ()) -> Section:
        """Read one file on top of its bases.

        `keys`: the section that it fills; `asked_at`: place of the `base:` that names it; `opened`: chain of files
        whose bases are being read.
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
        entry = self._parse(text, _Source(name, path.parent, path.parent, (*opened, path.resolve())), keys)
        if isinstance(entry, Leaf) and entry.value is not None:
            return self._unreadable(f"{name}: should hold `key: value` lines, holds {entry.value!r}")
        return Section(entry.entries if isinstance(entry, Section) else {}, name)

    def read_override(self, override: str, *, presets_from: Path = Path()) -> Section:
        """Read one `dotted.key=value`; the value is YAML, and a base in it is relative to the working directory.

        `presets_from`: folder from which presets are searched.
        """
        source = _Source(COMMAND_LINE + override, Path(), presets_from, numbered=False)
        key, equals, text = override.partition("=")
        *sections, last = key.strip().split(".")
        if not equals or not all((*sections, last)):
            self.problems.append(f"{source.name}: write dotted.key=value, for example train.steps=100")
            return Section({}, source.name)
        value = _at(self._parse(text, source, (*sections, last)), source.name)
        tree = self._with_bases({last: value}, source.name, source, tuple(sections))
        for section in reversed(sections):
            tree = Section({section: tree}, source.name)
        return tree

    def _unreadable(self, problem: str) -> Section:
        self.problems.append(problem)
        self.complete = False
        return Section({}, "")

    def _parse(self, text: str, source: _Source, keys: Keys) -> Section | Leaf:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return Leaf(None, source.name) if node is None else self._entry(loader, node, source, keys)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
            mark = getattr(error, "problem_mark", None)
            place = f"{source.name}:{mark.line + 1}" if mark and source.numbered else source.name
            return self._unreadable(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}")
        finally:
            loader.dispose()

    def _entry(self, loader: _Loader, node: yaml.Node, source: _Source, keys: Keys) -> Section | Leaf:
        if not isinstance(node, yaml.MappingNode):
            leaf = Leaf(loader.construct_object(node, deep=True), source.place(node))
            if keys in self.presets and isinstance(leaf.value, str):
                return replace(self._read_base(leaf.value, leaf.place, source, keys), complete=True)
            return leaf
        entries: dict[str, Section | Leaf] = {}
        for key_node, value_node in node.value:
            key, place = str(key_node.value), source.place(key_node)
            if key in entries:
                self.problems.append(f"{place}: {key}: written twice, first at {entries[key].place}")
            entries[key] = _at(self._entry(loader, value_node, source, (*keys, key)), place)
        return self._with_bases(entries, source.place(node), source, keys)

    def _with_bases(self, entries: dict[str, Section | Leaf], place: str, source: _Source, keys: Keys) -> Section:
        base = entries.get(BASE, Leaf([], place))
        paths = base.value if isinstance(base, Leaf) else base.plain()
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            return self._unreadable(f"{base.place}: {BASE}: should be a path or a list of paths, got {paths!r}")
        section = Section({}, place)
        for number, path in enumerate(paths):
            added = self._read_base(path, base.place, source, keys)
            if added.complete and number:
                pair = f"the preset {path!r} would replace {paths[number - 1]!r} before it"
                return self._unreadable(f"{base.place}: {'.'.join(keys)}: {pair}; put a preset first, or leave one out")
            section = merge(section, added)
        return merge(section, Section({key: entry for key, entry in entries.items() if key != BASE}, place))

    def _read_base(self, text: str, place: str, source: _Source, keys: Keys) -> Section:
        """Read the file of a base, given by its path or, in a section of `presets`, by its name."""
        named = keys in self.presets and is_name(text)
        try:
            path = (
                find_preset(text, keys[-1], folder=source.presets_from, opened=source.opened)
                if named
                else source.folder / Path(text).expanduser()
            )
        except ConfigError as error:
            return self._unreadable(f"{place}: {'.'.join(keys)}: {error}")
        if keys in self.presets and not path.name.endswith(SUFFIXES) and not path.is_file():
            return self._unreadable(
                f"{place}: {'.'.join(keys)}: there is no file {text!r}; the name of a preset has no folder, as in "
                f"{path.name}, and a path ends with {SUFFIXES[0]}"
            )
        section = self.read_file(path, keys=keys, asked_at=place, opened=source.opened)
        if named and not section.entries and self.complete:
            return self._unreadable(f"{place}: {'.'.join(keys)}: the preset {os.path.normpath(path)} is empty")
        return replace(section, complete=named)


def _at(entry: Section | Leaf, place: str) -> Section | Leaf:
    """Return the entry with the place of its key."""
    return replace(entry, place=place)
