"""Tables of hand-checked cases, and the proof that they would catch a wrong port.

A row is a quirk's name, a call, and what the official script gives. The call looks its function up when it runs, so
that a test can put a wrong variant in its place and see that some row notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest

Row = tuple[str, Callable[[], object], object]
ENOUGH = 40


def rows(module: ModuleType, function: str, table: Iterable[tuple[Any, ...]], **options: object) -> list[Row]:
    """Rows from (quirk, arguments..., expected): each calls `module.function`."""

    def call(arguments: Sequence[object]) -> Callable[[], object]:
        return lambda: getattr(module, function)(*arguments, **options)

    return [(quirk, call(rest[:-1]), rest[-1]) for quirk, *rest in table]


def same(found: object, expected: object) -> bool:
    """Equal, nan to nan too."""
    return found == expected or repr(found) == repr(expected)


def names(table: Sequence[Row]) -> list[str]:
    """The quirks, for test ids. A table must have enough of them, each under its own name."""
    quirks = [quirk for quirk, _, _ in table]
    twice = sorted({quirk for quirk in quirks if quirks.count(quirk) > 1})
    assert not twice, f"two cases have one name: {twice}"
    assert len(quirks) >= ENOUGH, f"{len(quirks)} cases, not {ENOUGH}"
    return quirks


def catches(
    table: Sequence[Row], monkeypatch: pytest.MonkeyPatch, module: ModuleType, wrong: Mapping[str, object]
) -> list[str]:
    """The quirks whose rows notice that these attributes of `module` are wrong ones.

    An exception is no answer: the variant must run.
    """
    for name, value in wrong.items():
        assert getattr(module, name) is not value
        monkeypatch.setattr(module, name, value)
    return [quirk for quirk, call, expected in table if not same(call(), expected)]
