"""Check data or machines before a run.

`doctor.py data` checks annotations with their images, or a prepared data set, and reports what is wrong. Exit codes:
0 clean, 1 findings (other than those of an allowed kind; repeated ids, records and images are information), 2 the check
itself failed.

`doctor.py env` checks the machines on every rank of a job, started under torchrun or srun like tools/train.py. Exit
codes: 0 a run is possible (warnings name what will slow it down), 2 a run is impossible (the error names the reasons).
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
from megatron_share4v.data.images.jpeg_damage import CAN_CHECK, NOT_CHECKED
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.prepare.annotations import AnnotationFile
from megatron_share4v.data.prepare.audit import (
    AUDIT_KINDS,
    INFORMATION,
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
from megatron_share4v.data.prepare.model_facts import format_model_facts
from megatron_share4v.data.prepare.validate import KINDS, RecordValidator
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import Share4VError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.observability.charts import histogram, save_png
from megatron_share4v.parallel.launch import World
from megatron_share4v.text.load_tokenizer import load_tokenizer, with_rule
from megatron_share4v.text.template import get_template
from megatron_share4v.text.tokenizer_config import RULES

PACK_LENGTH = 4096
RECIPE: dict[str, object] = {
    "tokens_per_image": 576,
    "image_size": 336,
    "image_aspect_ratio": "pad",
    "image_orientation": "stored",
    "micro_batch_size": 8,
    "global_batch_size": 128,
    "pad_multiple": 8,
    "pack_length": PACK_LENGTH,
}
"""Numbers of ShareGPT4V's recipe, where neither an option nor --config gives another."""


def main(arguments: list[str] | None = None) -> int:
    """Run the check, print its report and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "env":
        return _check_machines(options)
    if (options.prepared is None) == (options.annotations is None) or (options.annotations is None) != (
        options.images is None
    ):
        parser.error("give a prepared directory, or --annotations and --images")
    if options.tokenizer is None and options.config is None:
        parser.error("give --tokenizer, or --config with the run's configuration, which names it")
    logging.configure(rank=0)
    try:
        _fill_in(options)
        if options.global_batch_size % options.micro_batch_size:
            parser.error(
                f"--global-batch-size {options.global_batch_size} is not a multiple of "
                f"--micro-batch-size {options.micro_batch_size}"
            )
        return _check_data(options)
    except (Share4VError, OSError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2


def _check_machines(options: argparse.Namespace) -> int:
    with exit_on_user_error():
        world = World.from_environment()
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        config = load_run(options.config, options.overrides) if options.config else None
        # Imports megatron-core, which `data` does not need.
        from megatron_share4v.resilience.preflight.cluster import check_nodes

        logging.configure(rank=world.rank)
        report = check_nodes(config, shared=options.shared, timeout_s=options.timeout)
    if report is not None:
        print(report)
    return 0


def _fill_in(options: argparse.Namespace) -> None:
    """Set the options that were not given to the run's values, without --config to those of the ShareGPT4V recipe."""
    values, options.policy = RECIPE, ImagePolicy(336)
    if options.config is not None:
        run = load_run(options.config)
        data, train, vision = run.data, run.train, run.model.vision
        options.policy = ImagePolicy.from_config(vision, data)
        values = {
            "tokenizer": Path(data.tokenizer),
            "template": data.template,
            "trained_markers": data.trained_markers,
            "max_text_length": data.max_text_length,
            "tokens_per_image": vision.num_features,
            "image_size": vision.image_size,
            "image_aspect_ratio": data.image_aspect_ratio,
            "image_orientation": data.image_orientation,
            "micro_batch_size": train.micro_batch_size,
            "global_batch_size": train.global_batch_size,
            "pad_multiple": data.pad_multiple,
            "pack_length": data.pack_length or min(PACK_LENGTH, run.model.language.max_position_embeddings),
        }
    for name, value in values.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    side = options.image_size
    source = str(options.config) if options.config else "ShareGPT4V's recipe; --config RUN.yaml takes a run's numbers"
    print(f"an image is {options.tokens_per_image} positions and {side} x {side} pixels, as in {source}")
    if options.config is not None:
        tokenizer = load_tokenizer(options.tokenizer, rule=options.tokenizer_rule)
        print(format_model_facts(run.model, tokenizer, options.template))


def _check_data(options: argparse.Namespace) -> int:
    if not CAN_CHECK:
        logging.get_logger().warning(NOT_CHECKED)
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("tokens_per_image", "micro_batch_size", "global_batch_size", "pad_multiple", "pack_length")
    shape = BatchShape(**{name: getattr(options, name) for name in names})
    with (
        tempfile.TemporaryDirectory() as scratch,
        (options.out / "findings.jsonl").open("w", encoding="utf-8") as findings,
    ):

        def write_finding(finding: Finding) -> None:
            findings.write(json.dumps(dataclasses.asdict(finding)) + "\n")

        records = _open_records(options, Path(scratch))
        result = audit_records(records, workers=options.workers, choose=options.show, on_finding=write_finding)
        text = format_report(result, shape, allowed=options.allow)
        (options.out / "report.txt").write_text(text, encoding="utf-8")
        if len(result.facts):
            lengths = sample_lengths(result, shape)
            x_label = "positions per sample, image slots included"
            chart = histogram(
                lengths, bins=2 * BINS, title=f"{len(lengths)} samples", x_label=x_label, y_label="samples"
            )
            save_png(chart, options.out / "lengths.png")
        _print_samples(options, records, result)
    print(text + f"\nall findings, this report and the histogram are in {options.out}")
    unexpected = sum(count for kind, count in result.counts.items() if kind not in (*options.allow, *INFORMATION))
    return 1 if unexpected or not result.records else 0


def _open_records(options: argparse.Namespace, scratch: Path) -> RecordSource:
    index = Index.open(options.prepared) if options.prepared else None
    tokenizer = load_tokenizer(options.tokenizer, rule=options.tokenizer_rule)
    if index and index.tokenizer_rule and tokenizer.rule and not options.tokenizer_rule:
        tokenizer = with_rule(tokenizer, index.tokenizer_rule, origin="the data set")
    if index:
        template, length = (
            options.template or index.info.template,
            options.max_text_length or index.info.max_text_length,
        )
        chosen = get_template(template, options.trained_markers or index.info.trained_markers)
        index.check(tokenizer=tokenizer, template=chosen, max_text_length=length)
        no_images = ImageFiles(options.prepared, archives=(), table=None)
        return DatasetSource(
            SampleReader(index), RecordValidator(no_images, tokenizer, chosen, length, keep_bytes=False)
        )
    images = scan_images(options.images, table=scratch / "archives", in_place=False)
    template, length = (
        get_template(options.template or "vicuna_v1", options.trained_markers or "answer_only"),
        options.max_text_length or 2048,
    )
    return AnnotationSource(
        AnnotationFile(options.annotations), RecordValidator(images, tokenizer, template, length, keep_bytes=False)
    )


def _print_samples(options: argparse.Namespace, records: RecordSource, result: AuditResult) -> None:
    policy = dataclasses.replace(
        options.policy, aspect_ratio=options.image_aspect_ratio, orientation=options.image_orientation
    )
    if options.image_size != policy.image_size:
        policy = dataclasses.replace(policy, image_size=options.image_size, resize_edge=None)
    validator = records.validator
    for position, item in result.chosen:
        sample = records.sample(item)
        text = format_sample(
            sample,
            tokenizer=validator.tokenizer,
            template=validator.template,
            max_text_length=validator.max_text_length,
            tokens_per_image=options.tokens_per_image,
            colour=sys.stdout.isatty(),
        )
        print(text)
        if sample.has_image:
            path = options.out / f"sample-{position:07d}.png"
            write_preprocessed(sample, path, policy=policy)
            print(f"    preprocessed image, as the vision tower reads it: {path}")
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_data_options(commands.add_parser("data", help="check a data set"))
    env = commands.add_parser("env", help="check the machines", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    env.add_argument(
        "config", nargs="?", help="the run's YAML file; without it only checks that need no configuration run"
    )
    env.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="overrides, as for tools/train.py")
    env.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        help="folder that all ranks must share, in addition to run.directory (repeatable)",
    )
    env.add_argument("--timeout", type=positive, default=300, help="seconds to wait for the other ranks")
    return parser


def _add_data_options(data: argparse.ArgumentParser) -> None:
    data.add_argument("prepared", type=Path, nargs="?", help="directory that tools/prepare_data.py has written")
    data.add_argument("--annotations", type=Path, help="JSON or JSON Lines file, as given to tools/prepare_data.py")
    data.add_argument("--images", type=Path, help="folder of images, as given to tools/prepare_data.py")
    data.add_argument("--config", type=Path, help="the run's YAML file, for all numbers below that are not given")
    data.add_argument("--tokenizer", type=Path, help="tokenizer.model or tokenizer.json (the run's)")
    data.add_argument(
        "--tokenizer-rule",
        choices=RULES,
        help="how text after a special token is tokenised (as prepared, or as the tokenizer's files say)",
    )
    data.add_argument("--template", help="conversation template (the run's, what was prepared with, or vicuna_v1)")
    data.add_argument(
        "--trained-markers",
        choices=("answer_only", "official"),
        help="what is trained beside answers (the run's, what was prepared with, or answer_only)",
    )
    data.add_argument(
        "--max-text-length",
        type=positive,
        help="positions kept, an image as one (the run's, as prepared, 2048)",
    )
    data.add_argument(
        "--out",
        type=Path,
        default=Path("runs/doctor"),
        help="output directory of findings.jsonl, report.txt and images (runs/doctor)",
    )
    data.add_argument(
        "--show",
        type=natural,
        default=0,
        metavar="K",
        help="print K samples as model input, and write their preprocessed images",
    )
    data.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=[*KINDS, *AUDIT_KINDS],
        help="kind of finding that does not fail the check (repeatable)",
    )
    run = data.add_argument_group("numbers of the run (from --config, else those of ShareGPT4V's recipe)")
    run.add_argument("--tokens-per-image", type=positive, help="positions of an image (576)")
    run.add_argument("--image-size", type=positive, help="side of the vision tower's input in pixels (336)")
    run.add_argument(
        "--image-aspect-ratio", choices=("pad", "square"), help="pad to a square, or crop the centre (pad)"
    )
    run.add_argument("--image-orientation", choices=("stored", "exif"), help="exif: apply EXIF orientation (stored)")
    run.add_argument("--micro-batch-size", type=positive, help="micro-batch size for the padding estimate (8)")
    run.add_argument("--global-batch-size", type=positive, help="global batch size for the padding estimate (128)")
    run.add_argument("--pad-multiple", type=positive, help="sequences are padded to a multiple of it (8)")
    run.add_argument("--pack-length", type=positive, help="positions of a pack (4096)")
    data.add_argument(
        "--workers",
        type=natural,
        default=os.cpu_count() or 1,
        help="decoding processes; 0: decode in this process (one a core)",
    )


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())
