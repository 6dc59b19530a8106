"""After a test run: has each test that docs/proof.md and docs/models.md name run and passed?

    python tests/check_proof.py REPORT.xml [REPORT.xml ...]      reports of pytest --junit-xml

A named file passes when at least one of its tests passed and none failed in any report; a named function likewise.
"""

from __future__ import annotations

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(ROOT / "docs" / name for name in ("proof.md", "models.md"))


def claims(page: Path) -> list[tuple[str, list[str]]]:
    """(claim, named tests) of every table row of the page."""
    rows = [
        line.strip().strip("|").rsplit("|", 1)
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    rows = [row for row in rows if not set(row[0]) <= set("- |") and row[0].strip() != "claim"]
    return [(claim.strip(), re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", named)) for claim, named in rows]


def functions_in(path: Path) -> list[str]:
    """Names of the test functions in a file; none where there is no file."""
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def outcomes(reports: list[Path]) -> dict[str, set[str]]:
    """Outcomes ("passed", "failed", "skipped") by test file and by file::function, over all reports."""
    found: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            bad = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcome = "skipped" if bad == {"skipped"} else "failed" if bad else "passed"
            path = case.get("classname", "").replace(".", "/") + ".py"
            found[path].add(outcome)
            found[f"{path}::{case.get('name', '').partition('[')[0]}"].add(outcome)
    return found


def main() -> int:
    """Print each claim whose test did not run or did not pass; 1 if there are any."""
    found = outcomes([Path(argument) for argument in sys.argv[1:]])
    missing = [
        f"{name} ({', '.join(sorted(found.get(name, {'not run'})))}): {claim}"
        for page in PAGES
        for claim, named in claims(page)
        for name in named
        if "passed" not in found.get(name, set()) or "failed" in found[name]
    ]
    print("\n".join(missing) or "docs/proof.md, docs/models.md: every named test ran and passed")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
