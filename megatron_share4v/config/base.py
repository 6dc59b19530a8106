"""The one decorator behind every configuration class, the strict scalar types they use, and the checks that look at several values.

A value that is wrong by itself is refused by its type. Values that are fine one by one but not together are named by the class's `conflicts`
method, which yields a Conflict for each; config/load.py reports both kinds with their place in the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

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
    """Values that do not go together: a sentence with the values in it, and the dotted keys concerned, relative to the class that found it."""

    message: str
    keys: tuple[str, ...]


class ConflictError(ValueError):
    """Raised when a configuration object is built from conflicting values; `conflicts` has them all."""

    def __init__(self, conflicts: Iterable[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(conflict.message for conflict in self.conflicts))


def _refuse_conflicts(self: Any) -> None:
    conflicts = tuple(self.conflicts())
    if conflicts:
        raise ConflictError(conflicts)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Frozen, keyword-only dataclass that validates its fields, refuses unknown ones, and refuses what its `conflicts()` yields, if it has that."""
    if hasattr(cls, "conflicts"):
        assert "__post_init__" not in vars(cls), f"{cls.__name__}: a check belongs into conflicts()"
        cls.__post_init__ = _refuse_conflicts
    return pydantic_dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
    )(cls)
