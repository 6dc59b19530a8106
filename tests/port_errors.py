"""Tables of hand-checked scoring cases, and checks that they detect wrong ports.

A row is the name of a quirk, a call, and the result of the official script. The call looks up its function when it
runs, so that a test can substitute a wrong variant and check that some row fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest

Row = tuple[str, Callable[[], object], object]
ENOUGH = 40


def rows(module: ModuleType, function: str, table: Iterable[tuple[Any, ...]], **options: object) -> list[Row]:
    """Build rows that call `module.function` from (quirk, arguments..., expected)."""

    def call(arguments: Sequence[object]) -> Callable[[], object]:
        return lambda: getattr(module, function)(*arguments, **options)

    return [(quirk, call(rest[:-1]), rest[-1]) for quirk, *rest in table]


def same(found: object, expected: object) -> bool:
    """Return whether both are equal; NaN equals NaN."""
    return found == expected or repr(found) == repr(expected)


def names(table: Sequence[Row]) -> list[str]:
    """Return the quirk names as test ids; checks that they are unique and at least ENOUGH."""
    quirks = [quirk for quirk, _, _ in table]
    twice = sorted({quirk for quirk in quirks if quirks.count(quirk) > 1})
    assert not twice, f"duplicate case names: {twice}"
    assert len(quirks) >= ENOUGH, f"{len(quirks)} cases, not {ENOUGH}"
    return quirks


def catches(
    table: Sequence[Row], monkeypatch: pytest.MonkeyPatch, module: ModuleType, wrong: Mapping[str, object]
) -> list[str]:
    """Substitute wrong attributes of `module` and return the quirks whose rows fail.

    The variant must run without an exception.
    """
    for name, value in wrong.items():
        assert getattr(module, name) is not value
        monkeypatch.setattr(module, name, value)
    return [quirk for quirk, call, expected in table if not same(call(), expected)]
