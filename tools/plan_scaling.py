"""Regenerate the tables of docs/scaling.md and the pictures: python tools/plan_scaling.py [--docs DIR]."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_share4v.errors import exit_on_closed_output
from megatron_share4v.files import read_text
from megatron_share4v.planner.scaling import draw_pictures, update_document

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder that has scaling.md")
    options = parser.parse_args()
    page = options.docs / "scaling.md"
    page.write_text(update_document(read_text(page), ROOT), encoding="utf-8")
    draw_pictures(ROOT, options.docs / "pictures")


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
