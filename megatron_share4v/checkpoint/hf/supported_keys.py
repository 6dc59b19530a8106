"""Refuse keys of a config.json whose value asks for what the layers do not compute, naming key, value and reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megatron_share4v.checkpoint.hf.families import REFUSED
from megatron_share4v.errors import ConversionError

Json = Mapping[str, Any]
Supported = Mapping[str, tuple[Any, ...]]
"""Keys that change the computation, with the supported values; an absent or null key has the first one."""


INTEGER, NUMBER, BOOLEAN, MAPPING, LIST = "an integer", "a number", "true or false", "a mapping", "a list"
_IS: dict[str, Callable[[Any], bool]] = {
    INTEGER: lambda value: isinstance(value, int) and not isinstance(value, bool),
    NUMBER: lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    BOOLEAN: lambda value: isinstance(value, bool),
    MAPPING: lambda value: isinstance(value, Mapping),
    LIST: lambda value: isinstance(value, list),
}


def refuse_unsupported(config: Json, supported: Supported, where: str) -> None:
    """Raise ConversionError naming every key of `config` with another value than `supported` allows."""
    problems = list(_unsupported(config, supported))
    if config.get("quantization_config") is not None:
        problems.append("quantization_config: quantised weights cannot be imported; give the original in fp32 or bf16")
    if problems:
        raise ConversionError(f"{where}: foreign architecture: {'; '.join(problems)}")


def refuse_wrong_types(config: Json, types: Mapping[str, str], where: str) -> None:
    """Raise ConversionError naming every key of `config` that is not of its type in `types`; null counts as absent."""
    problems = [
        f"{key} is {config[key]!r}, not {kind}"
        for key, kind in types.items()
        if config.get(key) is not None and not _IS[kind](config[key])
    ]
    if problems:
        raise ConversionError(f"{where}: {'; '.join(problems)}; correct the file, or copy it again")


def refuse_model_type(model_type: object, *, known: Iterable[str], where: str, what: str) -> None:
    """Raise ConversionError when `model_type` is not one of `known`, with the reason where one is known."""
    known = tuple(known)
    if model_type not in known:
        reason = REFUSED.get(str(model_type))
        raise ConversionError(
            f"{where}: foreign architecture: {what} of model_type {model_type!r} is not supported"
            + (f" ({reason})" if reason else "")
            + f"; supported are {', '.join(known)}"
        )


def describe_invalid(error: Exception) -> str:
    """Return the problems of a configuration that was refused, without pydantic's frame."""
    if not isinstance(error, ValidationError):
        return str(error)
    problems = ((".".join(map(str, part["loc"])), part["msg"].removeprefix("Value error, ")) for part in error.errors())
    return "; ".join(f"{place}: {message}" if place else message for place, message in problems)


def _unsupported(config: Json, supported: Supported) -> Iterator[str]:
    for key, values in supported.items():
        value = config.get(key)
        if value is not None and value not in values:
            yield f"{key} is {value!r}, supported is {' or '.join(repr(value) for value in values)}"
