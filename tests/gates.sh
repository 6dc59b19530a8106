#!/usr/bin/env bash
# Linter, formatter and type checker, in about a minute; the first failure ends it. tests/run.sh calls it first.
#   bash tests/gates.sh           check
#   bash tests/gates.sh --fix     apply what ruff can fix by itself, format, and take fixed type errors off the baseline
# The type baseline (tests/mypy_baseline.txt) lists known errors. It may only shrink: a new error fails, and so does a
# fixed one that is still listed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --fix ]; then
    python -m ruff check --fix .
    python -m ruff format .
    python -m mypy | python -m mypy_baseline sync
    git diff --stat -- tests/mypy_baseline.txt
    exit 0
fi
python -m ruff check .
python -m ruff format --check .
# mypy's exit code 1 means type errors, which the baseline decides about; 2 means that mypy itself failed.
found="$(python -m mypy)" || [ $? = 1 ] || { echo "$found" >&2; exit 1; }
if ! python -m mypy_baseline filter <<<"$found"; then
    echo "mypy: errors not in tests/mypy_baseline.txt, or listed ones that are fixed; see CONTRIBUTING.md" >&2
    exit 1
fi
