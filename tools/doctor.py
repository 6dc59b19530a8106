"""Look before a launch.

`doctor.py data` examines annotations with their images, or a prepared data set, and names what is wrong. Exit code 0: clean, 1: findings (other than
those of an allowed kind), 2: it could not look. `doctor.py env` examines the machines, on every rank of a job: under torchrun or srun as
tools/train.py. Exit code 0: a run is possible, and what will slow it down is said in warnings, 2: it is not, and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

from megatron_share4v import logging
from megatron_share4v.config.arguments import natural, positive
from megatron_share4v.config.load import load_run
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.prepare.annotations import AnnotationFile
from megatron_share4v.data.prepare.audit import (
    AUDIT_KINDS,
    AnnotationSource,
    AuditResult,
    DatasetSource,
    Finding,
    RecordSource,
    audit_records,
)
from megatron_share4v.data.prepare.audit_report import BINS, BatchShape, format_report, sample_lengths
from megatron_share4v.data.prepare.audit_samples import format_sample, write_preprocessed
from megatron_share4v.data.prepare.image_files import ImageFiles, scan_images
from megatron_share4v.data.prepare.validate import KINDS, RecordValidator
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import Share4VError, exit_on_user_error
from megatron_share4v.observability.charts import histogram, save_png
from megatron_share4v.parallel.launch import World
from megatron_share4v.text.template import get_template
from megatron_share4v.text.tokenizer import Tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Look, print a report, return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "env":
        return _env(options)
    if (options.prepared is None) == (options.annotations is None) or (options.annotations is None) != (
        options.images is None
    ):
        parser.error("give a prepared directory, or --annotations and --images")
    if options.global_batch_size % options.micro_batch_size:
        parser.error(
            f"--global-batch-size {options.global_batch_size} is not a multiple of --micro-batch-size {options.micro_batch_size}"
        )
    logging.configure(rank=0)
    try:
        return _data(options)
    except (Share4VError, OSError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2


def _env(options: argparse.Namespace) -> int:
    with exit_on_user_error():
        world = World.from_environment()
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        config = load_run(options.config, options.overrides) if options.config else None
        from megatron_share4v.resilience.preflight.cluster import (
            check_nodes,  # imports megatron-core, which `data` needs nothing of
        )

        logging.configure(rank=world.rank)
        report = check_nodes(config, shared=options.shared, timeout_s=options.timeout)
    if report is not None:
        print(report)
    return 0


def _data(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("tokens_per_image", "micro_batch_size", "global_batch_size", "pad_multiple", "pack_length")
    shape = BatchShape(**{name: getattr(options, name) for name in names})
    with (
        tempfile.TemporaryDirectory() as scratch,
        (options.out / "findings.jsonl").open("w", encoding="utf-8") as findings,
    ):

        def write(finding: Finding) -> None:
            findings.write(json.dumps(dataclasses.asdict(finding)) + "\n")

        records = _records(options, Path(scratch))
        result = audit_records(records, workers=options.workers, choose=options.show, on_finding=write)
        text = format_report(result, shape, allowed=options.allow)
        (options.out / "report.txt").write_text(text, encoding="utf-8")
        if len(result.facts):
            lengths = sample_lengths(result, shape)
            x_label = "positions per sample, image slots included"
            chart = histogram(
                lengths, bins=2 * BINS, title=f"{len(lengths)} samples", x_label=x_label, y_label="samples"
            )
            save_png(chart, options.out / "lengths.png")
        _show(options, records, result)
    print(text + f"\nall findings, this report and the histogram are in {options.out}")
    unexpected = sum(count for kind, count in result.counts.items() if kind not in options.allow)
    return 1 if unexpected or not result.records else 0


def _records(options: argparse.Namespace, scratch: Path) -> RecordSource:
    tokenizer = Tokenizer(options.tokenizer)
    if options.prepared:
        index = Index.open(options.prepared)
        template, length = (
            options.template or index.info.template,
            options.max_text_length or index.info.max_text_length,
        )
        index.check(tokenizer=tokenizer, template=get_template(template).name, max_text_length=length)
        nothing = ImageFiles(options.prepared, archives=(), table=None)
        return DatasetSource(
            SampleReader(index), RecordValidator(nothing, tokenizer, get_template(template), length, keep_bytes=False)
        )
    images = scan_images(options.images, table=scratch / "archives", in_place=False)
    template, length = get_template(options.template or "vicuna_v1"), options.max_text_length or 2048
    return AnnotationSource(
        AnnotationFile(options.annotations), RecordValidator(images, tokenizer, template, length, keep_bytes=False)
    )


def _show(options: argparse.Namespace, records: RecordSource, result: AuditResult) -> None:
    policy = ImagePolicy(image_size=options.image_size, aspect_ratio=options.image_aspect_ratio)
    validator = records.validator
    for position, item in result.chosen:
        sample = records.sample(item)
        text = format_sample(
            sample, tokenizer=validator.tokenizer, template=validator.template, max_text_length=validator.max_text_length,
            tokens_per_image=options.tokens_per_image, colour=sys.stdout.isatty(),
        )  # fmt: skip
        print(text)
        if sample.has_image:
            path = options.out / f"sample-{position:07d}.png"
            write_preprocessed(sample, path, policy=policy)
            print(f"    image as the tower is given it: {path}")
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser(
        "data", help="examine a data set", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data.add_argument("prepared", type=Path, nargs="?", help="directory that tools/prepare_data.py has written")
    data.add_argument("--annotations", type=Path, help="JSON file, as given to tools/prepare_data.py")
    data.add_argument("--images", type=Path, help="folder of images, as given to tools/prepare_data.py")
    data.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece tokenizer.model")
    data.add_argument("--template", help="conversation template (vicuna_v1, or what the directory was prepared with)")
    data.add_argument(
        "--max-text-length", type=positive, help="positions kept, an image counted as one (2048, or as prepared)"
    )
    data.add_argument(
        "--out",
        type=Path,
        default=Path("runs/doctor"),
        help="where findings.jsonl, report.txt and pictures are written",
    )
    data.add_argument(
        "--show",
        type=natural,
        default=0,
        metavar="K",
        help="print K samples as the model sees them, and write their images",
    )
    data.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=[*KINDS, *AUDIT_KINDS],
        help="a kind of finding that is not to fail",
    )
    data.add_argument("--tokens-per-image", type=positive, default=576, help="positions that an image takes")
    data.add_argument("--image-size", type=positive, default=336, help="side of the tower's input")
    data.add_argument(
        "--image-aspect-ratio", choices=("pad", "square"), default="pad", help="pad to a square, or crop the centre"
    )
    data.add_argument("--micro-batch-size", type=positive, default=8, help="for the padding")
    data.add_argument("--global-batch-size", type=positive, default=128, help="for the padding")
    data.add_argument("--pad-multiple", type=positive, default=8, help="sequences are rounded up to it")
    data.add_argument("--pack-length", type=positive, default=4096, help="positions of a pack")
    data.add_argument(
        "--workers", type=natural, default=os.cpu_count() or 1, help="processes that decode; 0: this process alone"
    )
    env = commands.add_parser(
        "env", help="examine the machines", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    env.add_argument("config", nargs="?", help="the run's YAML file; without it only what every run needs is looked at")
    env.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="as tools/train.py will be given")
    env.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        help="a folder that all ranks must share, besides run.directory",
    )
    env.add_argument("--timeout", type=positive, default=300, help="seconds that the ranks wait for each other")
    return parser


if __name__ == "__main__":
    sys.exit(main())
