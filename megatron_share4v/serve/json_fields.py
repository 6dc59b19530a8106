"""Typed access to the fields of a JSON request body.

Errors are ApiErrors that name the field, its value and the accepted values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_share4v.serve.api_error import ApiError

SHOWN = 60
INT64 = 2**63
MAX_DEPTH, MAX_VALUES = 32, 1 << 21
_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def parse_object(body: bytes) -> JsonFields:
    """Parse the body of a request. Raises ApiError unless it is one JSON object."""
    if (count := sum(map(body.count, (b"[", b"{", b",")))) > MAX_VALUES:
        raise ApiError(f"the body has {count} brackets and commas; accepted are {MAX_VALUES}", status=413)
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise _nested_too_deeply() from error
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {str(error)[:200]}") from error
    _check_depth(value)
    return JsonFields.of(value, "")


def _check_depth(value: Any) -> None:
    """Raise ApiError for arrays and objects more than MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _nested_too_deeply()


def _nested_too_deeply() -> ApiError:
    return ApiError(f"the body is nested too deeply: accepted are {MAX_DEPTH} levels, and no field needs that many")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def format_value(value: Any) -> str:
    """A value for an error message: its JSON type, and the value when it is short."""
    if isinstance(value, (dict, list)):
        return f"{_NAMES[type(value)]} of {len(value)}"
    if isinstance(value, str):
        return (
            repr(value if len(value) <= SHOWN else f"{value[:SHOWN]}...").encode("ascii", "backslashreplace").decode()
        )
    if isinstance(value, int) and abs(value) >= INT64:
        return "an integer of more than 64 bits"
    return json.dumps(value)


def _check_unicode(text: str, name: str) -> None:
    """Refuse half a surrogate pair, which JSON can represent and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            f"{name} has half a surrogate pair, {format_value(text[error.start])}, at character {error.start}, which "
            "is no Unicode",
            param=name,
        ) from error


class JsonFields:
    """Fields of one JSON object. `path`: its dotted location in the body. A missing or null field takes its default."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values, self.path = values, path

    @classmethod
    def of(cls, value: Any, path: str) -> JsonFields:
        """Wrap `value`. Raises ApiError unless it is an object."""
        if not isinstance(value, dict):
            raise ApiError(f"{path or 'the body'} must be an object, got {format_value(value)}", param=path or None)
        return cls(value, path)

    def name(self, key: str) -> str:
        """Dotted name of a field."""
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        """Whether a field is present and not null."""
        return self.values.get(key) is not None

    def refuse(self, key: str, wanted: str) -> ApiError:
        """An error to raise: the field must be `wanted`."""
        return ApiError(
            f"{self.name(key)} must be {wanted}, got {format_value(self.values.get(key))}", param=self.name(key)
        )

    def integer(self, key: str, default: Any = None, *, low: int = -INT64, high: int = INT64 - 1) -> Any:
        """An integer from low to high; 3.0 and true are rejected."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            least = f" from {low}" if low > -INT64 else ""
            most = f" to {high}" if high < INT64 - 1 else ""
            raise self.refuse(key, f"an integer{least}{most}" if least + most else "an integer of at most 64 bits")
        return value

    def number(self, key: str, default: Any = None, *, low: float, high: float, above: bool = False) -> Any:
        """A finite number from low to high; `above` excludes low itself."""
        value = self.values.get(key)
        if value is None:
            return default
        if (
            type(value) not in (int, float)
            or not low <= value <= high
            or (above and value == low)
            or not math.isfinite(value)
        ):
            raise self.refuse(key, f"a number {'above' if above else 'from'} {low:g} {'up ' * above}to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: Any = None, *, longest: int | None = None) -> Any:
        """A string."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not str:
            raise self.refuse(key, "a string")
        if longest is not None and len(value) > longest:
            raise ApiError(
                f"{self.name(key)} has {len(value)} characters; accepted are {longest}", param=self.name(key)
            )
        _check_unicode(value, self.name(key))
        return value

    def items(self, key: str, *, longest: int, kind: type, shortest: int = 0) -> list[Any]:
        """An array of `shortest` to `longest` values of one type; missing: empty."""
        value = self.values.get(key)
        if value is None and not shortest:
            return []
        if type(value) is not list or not shortest <= len(value) <= longest:
            raise self.refuse(key, f"an array of {shortest} to {longest} values")
        for place, item in enumerate(value):
            if type(item) is not kind:
                raise ApiError(
                    f"{self.name(key)}[{place}] must be {_NAMES[kind]}, got {format_value(item)}",
                    param=f"{self.name(key)}[{place}]",
                )
            if isinstance(item, str):
                _check_unicode(item, f"{self.name(key)}[{place}]")
        return value

    def child(self, key: str) -> JsonFields:
        """An object; missing: an empty one."""
        return JsonFields.of(self.values.get(key) if self.has(key) else {}, self.name(key))
