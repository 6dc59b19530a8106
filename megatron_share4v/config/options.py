"""Command-line options made from the fields of a `@config` class."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from megatron_share4v.config.load import from_options

T = TypeVar("T")
NULL, TRUE, FALSE = "null", "true", "false"


def add_config_options(group: argparse._ArgumentGroup, cls: type) -> None:
    """Add one option per field of a `@config` class, `--max-waiting 64` for `max_waiting`; for build_config.

    A field of several values takes any number of words, `true` and `false` are for booleans, and `null` is for fields
    that may be None.
    """
    for name, field in _fields(cls).items():
        kinds = _plain_types(field.annotation)
        several = tuple in kinds
        values = _describe(kinds)
        text = f"{(field.description or '').replace('%', '%%')} (default: {field.default})".strip()
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            type=str if several else _reader(kinds),
            nargs="*" if several else None,
            metavar=values,
            help=text,
        )


def build_config(cls: type[T], arguments: argparse.Namespace) -> T:
    """Build a `@config` class from the options of add_config_options. Raises ConfigError with the options' names."""
    given = vars(arguments)
    return from_options(cls, {name: given[name] for name in _fields(cls) if name in given})


def _fields(cls: type) -> Mapping[str, Any]:
    return vars(cls)["__pydantic_fields__"]


def _plain_types(annotation: Any) -> frozenset[type]:
    """Types that an annotation allows, without their constraints: {int, NoneType} for `PositiveInt | None`."""
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return frozenset({tuple})
    arguments = get_args(annotation)
    return frozenset().union(*map(_plain_types, arguments)) if arguments else frozenset({annotation})


def _describe(kinds: frozenset[type]) -> str:
    """Name of a field's value in the help."""
    names = {bool: f"{TRUE}|{FALSE}", int: "N", float: "X", str: "TEXT", tuple: "NAME"}
    [name] = [names[kind] for kind in kinds if kind in names]
    return name


def _reader(kinds: frozenset[type]) -> Callable[[str], Any]:
    """Reader of a field's value. What cannot be read stays a string, which the class then refuses with its reason."""

    def read(text: str) -> Any:
        if str in kinds:
            return text
        if NoneType in kinds and text == NULL:
            return None
        if bool in kinds:
            return {TRUE: True, FALSE: False}.get(text.lower(), text)
        for kind in (int, float):
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    return kind(text)
        return text

    return read
