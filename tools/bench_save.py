"""Benchmark of checkpoint saves, blocking and in the background, on a tiny model with a large vocabulary.

Prints for both how long training waits per save, and the median time of steps that overlap a save by more than half
against steps between saves. Needs at least two cores, one for training and one for writing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from megatron_share4v.config.load import load_run
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.errors import exit_on_closed_output
from megatron_share4v.train import loop
from megatron_share4v.train.checkpoint_saver import Saver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: examples/ is no installed package

from examples.quickstart.dataset import write_dataset
from examples.quickstart.tokenizer import train_tokenizer
from megatron_share4v.files import read_text

MODEL = Path(__file__).parents[1] / "examples" / "models" / "tiny.yaml"
BYTES_PER_WEIGHT = 16  # fp32: weight, master weight and two moments
HIDDEN = 128


class TimedSaver(Saver):
    """Saver that records when each write started and ended."""

    spans: ClassVar[list[tuple[float, float]]] = []

    def _complete(self, *arguments: Any) -> None:
        began = time.time()
        super()._complete(*arguments)
        self.spans.append((began, time.time()))


def make_run(root: Path) -> Path:
    """Prepare a small quickstart data set and return the YAML file of the run."""
    write_dataset(root / "scenes", train_scenes=40, held_out_scenes=64, seed=3, image_size=56)
    annotations = root / "scenes" / "finetune.json"
    texts = [turn["value"] for record in json.loads(read_text(annotations)) for turn in record["conversations"]]
    train_tokenizer(texts, root / "tokenizer.model", vocab_size=400)
    prepare(
        PrepareOptions(
            annotations=annotations,
            images=root / "scenes",
            output=root / "data",
            tokenizer=root / "tokenizer.model",
            max_text_length=400,
            max_rejected_fraction=0.0,
            workers=0,
        )
    )
    (root / "run.yaml").write_text(f"model:\n  base: {MODEL}\n")
    return root / "run.yaml"


def measure(config: Path, *, megabytes: int, steps: int, every: int, batch: int, background: bool) -> dict[str, float]:
    """Train a run and return its durations in seconds and the size of a checkpoint in bytes."""
    root = config.parent
    directory = root / ("background" if background else "blocking")
    options = {
        "run.directory": directory,
        "precision.dtype": "fp32",
        "data.train": root / "data",
        "data.tokenizer": root / "tokenizer.model",
        "data.max_text_length": 400,
        "data.num_workers": 0,
        "model.language.vocab_size": megabytes * 10**6 // (2 * HIDDEN * BYTES_PER_WEIGHT) // 128 * 128,
        "train.global_batch_size": batch,
        "train.micro_batch_size": 4,
        "train.steps": steps,
        "checkpoint.every_steps": every,
        "checkpoint.keep_last": 1,
        "checkpoint.in_background": background,
        "log.tensorboard": False,
        "log.every_steps": 1000,
    }
    TimedSaver.spans.clear()
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in options.items()}
    loop.run(load_run(config, [f"{key}={text}" for key, text in texts.items()]))
    lines = [json.loads(line) for line in read_text(directory / "metrics.jsonl").splitlines()][2:]
    during: list[float] = []
    between: list[float] = []
    for line in lines:
        began, ended = line["time"] - line["step_time_s"], line["time"]
        overlap_s = sum(max(0.0, min(last, ended) - max(first, began)) for first, last in TimedSaver.spans)
        overlap = overlap_s / (ended - began)
        if overlap == 0.0 or overlap > 0.5:
            (during if overlap else between).append(line["step_time_s"])
    return {
        "wait_s": statistics.median(line["checkpoint_s"] for line in lines if line["checkpoint_s"]),
        "write_s": statistics.median(last - first for first, last in TimedSaver.spans),
        "between_s": statistics.median(between),
        "during_s": statistics.median(during) if during else math.nan,
        "steps_during": len(during),
        "bytes": sum(path.stat().st_size for path in next((directory / "checkpoints").glob("step_*")).iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=800, help="approximate size of a checkpoint")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=12, help="steps between saves")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary directory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory) as name,
        mock.patch.object(loop, "Saver", TimedSaver),
    ):
        config = make_run(Path(name))
        for background in (False, True):
            found = measure(
                config,
                megabytes=arguments.megabytes,
                steps=arguments.steps,
                every=arguments.every,
                batch=arguments.batch,
                background=background,
            )
            mode = "in the background" if background else "blocking"
            print(
                f"{mode}: {found['bytes'] / 1e6:.0f} MB written in {found['write_s']:.2f} s; "
                f"training waited {found['wait_s']:.2f} s per save"
            )
            if background:
                ratio = found["during_s"] / found["between_s"]
                print(
                    f"{found['steps_during']} steps during a save: {found['during_s']:.3f} s each, "
                    f"between saves {found['between_s']:.3f} s, ratio {ratio:.2f}"
                )


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
