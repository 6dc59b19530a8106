"""Load the exported model as a user would, through transformers' Auto classes, and compare it with the checkpoint on held-out pictures.

Run by examples/quickstart/run.sh, in one process. Writes OUT/hf_export.json, which score.py reports; exit code 1 when the two disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_share4v.errors import exit_on_user_error
from megatron_share4v.logging import configure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: examples/ is no installed package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--questions", type=int, default=16, help="held-out questions that both models answer")
    arguments = parser.parse_args()
    configure(rank=0)
    with exit_on_user_error():
        holds = compare(arguments.out, arguments.questions)
    sys.exit(0 if holds else 1)


def compare(out: Path, count: int) -> bool:
    """Whether ids, pixels, logits and greedy answers agree; what was found goes to the file."""
    from examples.quickstart.scoring import held_out_questions
    from megatron_share4v.evaluate.agreement import compare_alone

    checkpoint, export = out / "finetune", out / "hf"
    found = compare_alone(checkpoint, export, questions=held_out_questions(out / "scenes" / "held_out.json")[:count])
    print(found)
    content = {"dir": str(export), "greedy_equal": found.greedy_equal, "max_logit_diff": found.max_logit_diff}
    (out / "hf_export.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    return found.holds


if __name__ == "__main__":
    main()
