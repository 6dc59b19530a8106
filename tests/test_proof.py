"""docs/proof.md and docs/models.md name tests that exist; tests/check_proof.py checks after a run that each passed."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_proof import PAGES, claims, functions_in

PROOF = Path(__file__).resolve().parents[1] / "docs" / "proof.md"
NAMED = sorted({name for page in PAGES for _, named in claims(page) for name in named})


def test_every_claim_names_a_test() -> None:
    assert len(claims(PROOF)) > 40
    assert [claim for claim, named in claims(PROOF) if not named] == []


@pytest.mark.parametrize("name", NAMED)
def test_named_test_exists(name: str) -> None:
    path, _, function = name.partition("::")
    found = functions_in(PROOF.parents[1] / path)
    assert found, f"{path} has no tests"
    assert not function or function in found, f"{path} has no test {function}"
