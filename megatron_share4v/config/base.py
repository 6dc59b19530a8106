"""The decorator of all configuration classes, their strict scalar types, and conflicts between values.

A value that is wrong by itself is refused by its type. Values that are valid one by one but not together are reported
by the `conflicts` method of the class; config/load.py reports both kinds with their place in the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

T = TypeVar("T")

# Strict: lax parsing would turn `tensor: true` into 1 and "8" into 8.
Int = Annotated[int, Strict()]
PositiveInt = Annotated[int, Strict(), Field(gt=0)]
NonNegativeInt = Annotated[int, Strict(), Field(ge=0)]
Bool = Annotated[bool, Strict()]
PositiveFloat = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1)]


@dataclass(frozen=True)
class Conflict:
    """Values that exclude each other: a message with the values, and their dotted keys relative to the class."""

    message: str
    keys: tuple[str, ...]


class ConflictError(ValueError):
    """Error of a configuration object with conflicting values, all of them in `conflicts`."""

    def __init__(self, conflicts: Iterable[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(conflict.message for conflict in self.conflicts))


def _refuse_conflicts(self: Any) -> None:
    conflicts = tuple(self.conflicts())
    if conflicts:
        raise ConflictError(conflicts)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass that validates its fields and refuses unknown ones and conflicts."""
    if hasattr(cls, "conflicts"):
        assert "__post_init__" not in vars(cls), f"{cls.__name__}: a check belongs into conflicts()"
        cast(Any, cls).__post_init__ = _refuse_conflicts
    settings = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    # pydantic returns a subtype of its own protocol; the class is the same.
    return cast(type[T], pydantic_dataclass(frozen=True, kw_only=True, config=settings)(cls))
