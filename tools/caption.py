"""Caption images with a trained model or an OpenAI-compatible endpoint.

Takes the options and files of ShareGPT4V's share-cap_batch_infer.py, and more: see docs/captioning.md. A killed job
resumes when the same command is started again: captions are kept in SAVE_PATH.journal/. torchrun --nproc-per-node N
tools/caption.py ... captions with N models at once. Exit code 3: some images have no caption (each is listed with its
error). The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_share4v.config.arguments import above_zero, at_least_zero, natural, positive
from megatron_share4v.errors import ConfigError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.logging import configure
from megatron_share4v.parallel.launch import World

KEY = "OPENAI_API_KEY"
DEFAULT_LIST = Path("images_to_describe.json")


def main() -> int:
    arguments = parse()
    with exit_on_user_error():
        world = World.from_environment()
    configure(rank=world.rank)
    try:
        with exit_on_user_error(rank=world.rank, ranks=world.size):
            summary = run(arguments, world)
    except OSError as error:
        print(f"caption: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("caption: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    if summary is None:
        return 0
    print(json.dumps(asdict(summary)), flush=True)
    return summary.exit_code


def run(arguments: argparse.Namespace, world: World):
    from megatron_share4v.caption.endpoint import caption_with_endpoint
    from megatron_share4v.caption.job import JobOptions
    from megatron_share4v.caption.records import CaptionSettings
    from megatron_share4v.remote.openai_client import Endpoint

    given = vars(arguments)
    if arguments.images_file is None and not arguments.images:
        given["images_file"] = DEFAULT_LIST
    job = JobOptions(**{name: given[name] for name in JobOptions.__dataclass_fields__})
    settings = CaptionSettings(**{name: given[name] for name in CaptionSettings.__dataclass_fields__})
    if (arguments.model_name is None) == (arguments.endpoint is None):
        raise ConfigError("give either --model-name (a checkpoint, a run directory or an export) or --endpoint")
    if arguments.endpoint is None:
        from megatron_share4v.caption.run import (  # this imports megatron-core: not for an endpoint
            ModelOptions,
            caption_with_model,
        )

        model = ModelOptions(
            name=arguments.model_name,
            batch_size=arguments.batch_size,
            tensor=arguments.num_gpus,
            dtype=arguments.dtype,
            workers=arguments.workers,
        )
        return caption_with_model(model, job, settings=settings, world=world)
    if arguments.endpoint_model is None:
        raise ConfigError(
            "--endpoint also needs --endpoint-model, the model's name as the server's /v1/models lists it"
        )
    endpoint = Endpoint(
        url=arguments.endpoint,
        model=arguments.endpoint_model,
        key=os.environ.get(KEY),
        concurrency=arguments.concurrency or arguments.batch_size,
        retries=arguments.retries,
        timeout_s=arguments.timeout,
    )
    return caption_with_endpoint(endpoint, job, settings=settings, world=world)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    official = parser.add_argument_group(
        "options of the published tool (differences are noted; published: its default)"
    )
    official.add_argument(
        "--images-file",
        type=Path,
        help=f"JSON list of paths; also .jsonl, and records ({DEFAULT_LIST}, unless --images)",
    )
    official.add_argument(
        "--save-path", type=Path, default=Path("captions.json"), help="JSON list of {path: caption} (captions.json)"
    )
    official.add_argument(
        "--model-name",
        help="checkpoint, run directory or export; no default, and ShareCaptioner's own weights are not read",
    )
    official.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        help="concurrent images, with continuous batching (16; published: 4)",
    )
    official.add_argument(
        "--num_gpus",
        type=positive,
        default=1,
        help="tensor-parallel processes of one model (1; published: split by layers)",
    )
    more = parser.add_argument_group("input")
    more.add_argument(
        "--images",
        nargs="+",
        default=(),
        help="folders, quoted globs, WebDataset tars, files; after those of --images-file",
    )
    more.add_argument("--images-root", type=Path, default=Path(), help="root of all relative paths (.)")
    out = parser.add_argument_group("further output")
    out.add_argument("--jsonl", type=Path, help="all rows: id, path, caption, tokens, finish_reason, error")
    out.add_argument(
        "--annotations", type=Path, help="ShareGPT4V records, for tools/prepare_data.py --images IMAGES_ROOT"
    )
    out.add_argument(
        "--shards",
        type=Path,
        help="directory of WebDataset shards with images and records; earlier shards in it are replaced",
    )
    out.add_argument("--samples-per-shard", type=positive, default=10_000)
    out.add_argument("--restart", action="store_true", help="discard the captions of earlier runs")
    out.add_argument("--retry-errors", action="store_true", help="retry images that failed")
    add_generation(parser.add_argument_group("generation"))
    endpoint = parser.add_argument_group(f"endpoint (key: from {KEY}, if set)")
    endpoint.add_argument("--endpoint", help="an OpenAI-compatible server's URL, up to and with /v1")
    endpoint.add_argument("--endpoint-model", help="the model's name there")
    endpoint.add_argument("--concurrency", type=positive, help="concurrent requests (--batch-size)")
    endpoint.add_argument("--retries", type=natural, default=5, help="retries per image (5)")
    endpoint.add_argument("--timeout", type=above_zero, default=300.0, help="seconds per response (300)")
    return parser.parse_args()


def add_generation(group: argparse._ArgumentGroup) -> None:
    from megatron_share4v.caption.records import INSTRUCTION

    group.add_argument("--prompt", default=INSTRUCTION, help=f"({INSTRUCTION})")
    group.add_argument("--max-new-tokens", type=positive, default=500, help="(500)")
    group.add_argument("--temperature", type=at_least_zero, default=0.0, help="0: greedy (0; published: 1)")
    group.add_argument("--top-p", type=above_zero, default=1.0, help="nucleus, when sampling (1)")
    group.add_argument("--repetition-penalty", type=above_zero, default=1.0, help="(1; published: 1.5)")
    group.add_argument(
        "--num-beams",
        type=positive,
        default=1,
        help="beam search, or with a temperature beam sampling (1; published: 3)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="sampling seed; each image's noise depends only on it and the image's id (0)",
    )
    group.add_argument("--dtype", choices=("fp32", "bf16"), help="default: as trained")
    group.add_argument("--workers", type=positive, default=4, help="threads that read and decode images (4)")


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())
