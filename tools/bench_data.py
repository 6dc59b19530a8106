"""Benchmark of the data path: preparing, sample plans, packing against padding, image decoding.

`--prepare [N]` builds the index of N synthetic records, `--plans [N]` measures time and memory of sample plans,
`--packing` compares packing with padding, `--images [N]` compares decoding with transformers' image processor. Each
benchmark has its own file in this folder. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench_images import bench_images
from bench_packing import bench_packing
from bench_plan import bench_plans
from bench_prepare import bench_prepare, bench_with_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: examples/ is no installed package

from examples.quickstart.tokenizer import train_tokenizer

RECORDS, IMAGES, DECODED = 1_250_000, 2_000, 512


def main(arguments: list[str] | None = None) -> int:
    """Run the selected benchmarks and print their results."""
    options = _parser().parse_args(arguments)
    found: dict[str, object] = {}
    if options.prepare:
        found["prepare"] = _prepare(options.prepare)
    if options.plans:
        found["plans"] = bench_plans(options.plans)
    if options.packing:
        found["packing"] = bench_packing()
    if options.images:
        found["images"] = bench_images(options.images, rounds=options.rounds)
    print(json.dumps(found))
    return 0


def _prepare(records: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        directory = Path(name)
        train_tokenizer(["a small red circle and a blue square"] * 50, directory / "tokenizer.model", vocab_size=300)
        tokenizer = directory / "tokenizer.model"
        return bench_prepare(directory, records=records, tokenizer=tokenizer) | bench_with_images(
            directory, images=min(records, IMAGES), tokenizer=tokenizer
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--prepare",
        type=int,
        nargs="?",
        const=RECORDS,
        metavar="N",
        help=f"build shards and index of N records ({RECORDS})",
    )
    parser.add_argument(
        "--plans",
        type=int,
        nargs="?",
        const=RECORDS,
        metavar="N",
        help=f"time and memory of every kind of plan for N samples ({RECORDS})",
    )
    parser.add_argument(
        "--packing", action="store_true", help="useful tokens per second of packing against padding, tiny model"
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="?",
        const=DECODED,
        metavar="N",
        help=f"images per second and core of each backend ({DECODED})",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="rounds of --images; every backend is measured once per round and its best round counts",
    )
    return parser


if __name__ == "__main__":
    from megatron_share4v.errors import exit_on_closed_output

    with exit_on_closed_output():
        sys.exit(main())
