"""Load the exported model through transformers' Auto classes and compare it with the checkpoint on held-out images.

Run by examples/quickstart/run.sh, in one process. Writes OUT/hf_export.json, which score.py reports. Exit code 1 when
the two disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: `examples` is not installed

from megatron_share4v.errors import exit_on_closed_output, exit_on_user_error
from megatron_share4v.logging import configure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--questions", type=int, default=16, help="number of held-out questions that both models answer"
    )
    arguments = parser.parse_args()
    configure(rank=0)
    with exit_on_user_error():
        holds = compare(arguments.out, arguments.questions)
    sys.exit(0 if holds else 1)


def compare(out: Path, count: int) -> bool:
    """Compare ids, pixels, logits and greedy answers, write hf_export.json and return whether they agree."""
    from examples.quickstart.scoring import load_questions
    from megatron_share4v.evaluate.agreement import compare_single_process

    checkpoint, export = out / "finetune", out / "hf"
    found = compare_single_process(
        checkpoint, export, questions=load_questions(out / "scenes" / "held_out.json")[:count]
    )
    print(found)
    content = {"dir": str(export), "greedy_equal": found.greedy_equal, "max_logit_diff": found.max_logit_diff}
    (out / "hf_export.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    return found.holds_with_text


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
