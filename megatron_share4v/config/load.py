"""Loading of a validated configuration object from a YAML file and overrides, and dumping it.

Precedence: defaults < base files < file < overrides `dotted.key=value`. All errors are reported at once, with file
and line. Relative paths inside a configuration stay relative to the working directory; only `base:` is relative to its
file (config/locate.py), and presets are searched from there (config/presets.py).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_share4v.config.base import Conflict, ConflictError
from megatron_share4v.config.locate import BASE, COMMAND_LINE, Keys, Reader, Section, merge
from megatron_share4v.config.presets import PRESET
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError

T = TypeVar("T")
UNKNOWN = "unexpected_keyword_argument"  # pydantic's name for it


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a training run; ConfigError lists all errors."""
    return load(RunConfig, path, overrides)


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Load a `@config` class from a YAML file and `dotted.key=value` overrides; ConfigError lists all errors."""
    reader = Reader(presets=frozenset(_preset_sections(cls)))
    tree = reader.read_file(Path(path))
    for override in overrides:
        tree = merge(tree, reader.read_override(override, presets_from=Path(path).parent))
    problems = list(reader.problems)
    result: T | None = None
    if reader.complete:
        validation = _Validation(cls, tree)
        result = validation.run()
        problems += validation.problems
    if problems:
        raise ConfigError("\n".join(sorted(problems, key=_reading_order)))
    assert result is not None, "an incomplete tree has problems"
    return result


def from_options(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a `@config` class from the options of a command; ConfigError lists all errors with their options."""
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            cause, place = detail.get("ctx", {}).get("error"), "_".join(str(part) for part in detail["loc"][:1])
            what = str(cause) if isinstance(cause, ConflictError) else _sentence(detail["msg"], detail["input"])
            problems.append(f"--{place.replace('_', '-')}: {what}" if place else what)
        raise ConfigError("\n".join(problems)) from error


def dump(config: Any) -> str:
    """Dump a configuration as YAML, defaults included; `load` reads it back to an equal object."""
    return yaml.safe_dump(
        TypeAdapter(type(config)).dump_python(config, mode="json"), sort_keys=False, allow_unicode=True
    )


def flat(config: Any) -> dict[str, Any]:
    """Return the values of a configuration by dotted key."""
    return dict(leaves(yaml.safe_load(dump(config))))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over (dotted key, value) of everything that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def restore(cls: type[T], text: str) -> T:
    """Load a configuration object from its `dump`."""
    return TypeAdapter(cls).validate_python(yaml.safe_load(text))


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON schema of a configuration class for editors, with `base` allowed in every section."""
    schema = TypeAdapter(cls).json_schema()
    for section in (schema, *schema.get("$defs", {}).values()):
        section.get("properties", {})[BASE] = {
            "description": "YAML file or files whose values this section starts from"
        }
    return schema


class _Validation:
    """Validates a tree repeatedly, each time without the values found wrong, so that conflicts are found too.

    A conflict that involves a value already found wrong is not reported.
    """

    ROUNDS = 12  # types, conflicts of nested sections, conflicts of the whole, placeholders of required keys in between

    def __init__(self, cls: type, tree: Section) -> None:
        self.cls, self.tree, self.values = cls, tree, tree.plain()
        self.known = dict(_fields(cls))
        self.wrong: set[Keys] = set()
        self.problems: list[str] = []

    def run(self) -> Any:
        """Return the object, which is valid only if `problems` is empty."""
        for _ in range(self.ROUNDS):
            try:
                return TypeAdapter(self.cls).validate_python(self.values)
            except ValidationError as error:
                details = error.errors()
            for detail in sorted(details, key=lambda detail: detail["type"] == UNKNOWN):
                self._note(detail)
        assert self.problems, "a value that cannot be validated has no error message"
        return None

    def _note(self, detail: Any) -> None:
        """Report one error of pydantic, and remove the value so that the next round can validate the rest."""
        location = tuple(str(part) for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if detail["type"] == UNKNOWN:
            self._note_unknown(location)
        elif isinstance(cause, ConflictError):
            self._note_conflicts(location, cause.conflicts)
        else:
            while location not in self.known and location:  # inside a list, or in one branch of a union
                location = location[:-1]
            missing = detail["type"] == "missing"
            self._note_value(
                location,
                "required key is missing" if missing else _sentence(detail["msg"], detail["input"]),
                missing=missing,
            )

    def _note_value(self, path: Keys, what: str, *, missing: bool) -> None:
        placeholder: Any = {} if self.known.get(path) else "?"
        if not self._is_wrong(path):
            self._report(path, what)
        elif not missing and _get(self.values, path) == "?":
            missing, placeholder = True, 1
        self.wrong.add(path)
        _remove(self.values, path)
        if missing:
            _put(self.values, path, placeholder)

    def _note_unknown(self, path: Keys) -> None:
        *section, key = path
        siblings = {known[-1]: known for known in self.known if known[:-1] == tuple(section)}
        near = get_close_matches(key, siblings, n=1)
        elsewhere = [".".join(known) for known in self.known if known[-1] == key]
        if near:
            self.wrong.add(siblings[near[0]])
        suggestion = (
            f"did you mean '{(near or elsewhere)[0]}'?" if near or elsewhere else f"known here: {', '.join(siblings)}"
        )
        self._report(path, f"unknown key; {suggestion}")
        _remove(self.values, path)

    def _note_conflicts(self, section: Keys, conflicts: Sequence[Conflict]) -> None:
        concerned = {conflict: [(*section, *key.split(".")) for key in conflict.keys] for conflict in conflicts}
        for conflict, paths in concerned.items():
            if not any(self._is_wrong(path) for path in paths):
                written = [path for path in paths if self.tree.has(path)]
                # Of conflicting values, the override is reported, since it was written last.
                overridden = [path for path in written if self.tree.place_of(path).startswith(COMMAND_LINE)]
                self._report((overridden or written or paths)[0], conflict.message)
        for path in {path for paths in concerned.values() for path in paths}:
            self.wrong.add(path)
            _remove(self.values, path)

    def _is_wrong(self, path: Keys) -> bool:
        return any(path[:length] in self.wrong for length in range(len(path) + 1))

    def _report(self, path: Keys, what: str) -> None:
        self.problems.append(": ".join(part for part in (self.tree.place_of(path), ".".join(path), what) if part))


def _fields(cls: Any, section: Keys = ()) -> Iterator[tuple[Keys, bool]]:
    """Iterate over all keys of a configuration class, nested ones included, and whether each is a section."""
    for name, field in cls.__pydantic_fields__.items():
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if dataclasses.is_dataclass(kind)]
        yield (*section, name), bool(inner)
        for kind in inner:
            yield from _fields(kind, (*section, name))


def _preset_sections(cls: Any, section: Keys = ()) -> Iterator[Keys]:
    """Iterate over the keys of the sections that may be written as the name of a preset."""
    for name, field in cls.__pydantic_fields__.items():
        if PRESET in field.metadata:
            yield (*section, name)
        if dataclasses.is_dataclass(field.annotation):
            yield from _preset_sections(field.annotation, (*section, name))


def _reading_order(problem: str) -> tuple[str, int]:
    """Sort by file, then line; errors of one place keep the order in which they were found."""
    place = re.match(r"(.+?):(\d+): ", problem)
    return (place[1], int(place[2])) if place else (problem.partition(":")[0], 0)


def _sentence(message: str, value: Any) -> str:
    what = message.replace("Input should", "should", 1).replace(
        "a dictionary or an instance of", "a section of `key: value` lines for", 1
    )
    return f"{what}, got {json.dumps(value, default=str, ensure_ascii=False)}"


def _get(values: Any, path: Keys) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _put(values: dict[str, Any], path: Keys, value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
    values[path[-1]] = value


def _remove(values: dict[str, Any], path: Keys) -> None:
    section = _get(values, path[:-1])
    if path and isinstance(section, dict):
        section.pop(path[-1], None)
