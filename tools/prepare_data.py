"""Turn LLaVA/ShareGPT4V annotations and their images into a data set for tools/train.py.

Writes shard-000000.tar ..., index.npy, keys.npy, dataset.json, rejected.jsonl and duplicates.jsonl to --output. After
an interruption, the same command resumes after the last complete shard. docs/data.md lists the downloads.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_share4v import logging
from megatron_share4v.config.arguments import natural, positive, share_or_zero
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.errors import Share4VError, exit_on_closed_output
from megatron_share4v.text.tokenizer_config import PUBLISHED_RULE, RULES


def main(arguments: list[str] | None = None) -> int:
    """Prepare, print a summary, return the exit code."""
    options = PrepareOptions(**vars(_parser().parse_args(arguments)))
    logging.configure(rank=0)
    try:
        print(prepare(options))
    except (Share4VError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "prepare_data: interrupted; run the same command again to resume after the last complete shard",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--annotations", type=Path, required=True, help="JSON file: a list of records with id, image and conversations"
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder that the records' image paths are relative to; tar and zip archives in it need not be unpacked",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write; published whole or not at all")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="tokenizer.model (sentencepiece) or tokenizer.json"
    )
    parser.add_argument(
        "--tokenizer-rule",
        choices=RULES,
        help="how text after a special token is tokenised (docs/data.md); None: as tokenizer_config.json beside the "
        f"tokenizer says, {PUBLISHED_RULE} without one",
    )
    parser.add_argument("--template", default="vicuna_v1", help="conversation template (docs/templates.md)")
    parser.add_argument(
        "--trained-markers",
        choices=("answer_only", "official"),
        default="answer_only",
        help="train answers and their ends, or also the markers that LLaVA-NeXT trains (qwen_1_5, llava_llama_3)",
    )
    parser.add_argument(
        "--max-text-length", type=positive, default=2048, help="positions kept per sample, an image counted as one"
    )
    parser.add_argument("--samples-per-shard", type=positive, default=10_000, help="samples in one tar file")
    parser.add_argument(
        "--max-rejected-fraction",
        type=share_or_zero,
        default=0.05,
        help="end with exit code 2 when more records than this are bad",
    )
    parser.add_argument(
        "--workers", type=natural, default=os.cpu_count() or 1, help="processes that decode; 0: this process alone"
    )
    parser.add_argument(
        "--in-place", action="store_true", default=False, help="index the images where they are, without copying them"
    )
    parser.add_argument(
        "--repeat-images",
        action="store_true",
        default=False,
        help="store a shared image with each of its samples, not once",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        default=False,
        help="start over instead of resuming an unfinished preparation",
    )
    parser.add_argument(
        "--overwrite", action="store_true", default=False, help="replace a data set that is already in --output"
    )
    return parser


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())
