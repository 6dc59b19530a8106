"""Evaluate a checkpoint, run directory, Hugging Face export or served model on a benchmark of the ShareGPT4V suite.

    python tools/evaluate.py CKPT --benchmark NAME --data DIR --out DIR
    torchrun --nproc-per-node 8 tools/evaluate.py CKPT ...                    eight replicas share the questions
    python tools/evaluate.py --endpoint URL/v1 --endpoint-model NAME ...      evaluate a served model
    python tools/evaluate.py --answers FILE ...                               score an official answer file

An interrupted command resumes when started again. docs/evaluation.md lists downloads and metrics. The last output line
is one JSON object. Exit code 3: some questions have no answer; the note in that line counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_share4v.config.arguments import model_directory, positive
from megatron_share4v.errors import ConfigError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.evaluate.metrics.profile import Profile
from megatron_share4v.exit_codes import ExitCode
from megatron_share4v.logging import configure
from megatron_share4v.parallel.launch import World

KEY, JUDGE_KEY = "OPENAI_API_KEY", "JUDGE_API_KEY"
SHOWN = (
    "model",
    "benchmark",
    "split",
    "profile",
    "headline",
    "scores",
    "judge",
    "complete",
    "questions",
    "answered",
    "note",
)


def main() -> int:
    arguments = parse()
    world = World.from_environment()
    configure(rank=world.rank)
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        content = run(arguments, world)
    if content is None:
        return ExitCode.OK
    print(json.dumps({name: content[name] for name in SHOWN} | {"out": str(arguments.out)}), flush=True)
    return ExitCode.OK if content["answered"] == content["questions"] else ExitCode.PARTIAL


def run(given: argparse.Namespace, world: World) -> dict[str, Any] | None:
    from megatron_share4v.evaluate.loaded_benchmark import Evaluation
    from megatron_share4v.evaluate.published import BenchmarkResult
    from megatron_share4v.evaluate.runner import Judge  # after the arguments are read: this imports megatron-core

    if sum(source is not None for source in (given.checkpoint, given.endpoint, given.answers)) != 1:
        raise ConfigError("give one of CKPT (a checkpoint, run directory or export), --endpoint and --answers")
    benchmark = Evaluation(
        given.benchmark,
        data=given.data,
        out=given.out,
        split=given.split,
        profile=Profile(given.profile),
        limit=given.limit,
    )
    more = {
        "judging": Judge(model=given.judge_model, chat=chat_of(given), seed=given.judge_seed),
        "compared": [BenchmarkResult.read(path) for path in given.compare],
        "restart": given.restart,
    }
    if given.answers is not None:
        return score_file(benchmark, given, world, more)
    return ask_endpoint(benchmark, given, world, more) if given.endpoint else ask_model(benchmark, given, world, more)


def chat_of(given: argparse.Namespace) -> Any:
    """Build the client of the judge endpoint; None without --judge-base-url."""
    from megatron_share4v.remote.openai_client import ChatClient, Endpoint

    if given.judge_base_url is None:
        return None
    key = os.environ.get(JUDGE_KEY) or os.environ.get(KEY)
    return ChatClient(
        Endpoint(url=given.judge_base_url, model=given.judge_model or "", key=key, concurrency=given.concurrency)
    )


def ask_model(benchmark: Any, given: argparse.Namespace, world: World, more: dict[str, Any]) -> dict[str, Any] | None:
    from megatron_share4v.evaluate.clients import LocalClient
    from megatron_share4v.evaluate.result import ModelFacts
    from megatron_share4v.evaluate.runner import run_benchmark
    from megatron_share4v.infer.data_parallel import open_replica

    with open_replica(
        given.checkpoint, tensor=given.tensor, max_requests=given.batch_size, dtype=given.dtype, world=world
    ) as replica:
        if replica is None:
            return None
        client = LocalClient(replica, decoding=benchmark.decoding, workers=given.workers)
        return run_benchmark(
            benchmark,
            client,
            model=ModelFacts.of_replica(replica, name=given.name or given.checkpoint.resolve().name),
            share=replica.share,
            **more,
        )


def ask_endpoint(
    benchmark: Any, given: argparse.Namespace, world: World, more: dict[str, Any]
) -> dict[str, Any] | None:
    from megatron_share4v.evaluate.clients import RemoteClient
    from megatron_share4v.evaluate.result import ModelFacts
    from megatron_share4v.evaluate.runner import run_benchmark
    from megatron_share4v.infer.answer_log import DPGroup
    from megatron_share4v.remote.openai_client import ChatClient, Endpoint

    if given.endpoint_model is None or world.size > 1:
        raise ConfigError(
            "--endpoint needs --endpoint-model, the model's name in the server's /v1/models, and one process: raise "
            "--concurrency instead"
        )
    endpoint = Endpoint(
        url=given.endpoint, model=given.endpoint_model, key=os.environ.get(KEY), concurrency=given.concurrency
    )
    client = RemoteClient(ChatClient(endpoint), decoding=benchmark.decoding)
    return run_benchmark(
        benchmark, client, model=ModelFacts.of_endpoint(endpoint, name=given.name), share=DPGroup(), **more
    )


def score_file(benchmark: Any, given: argparse.Namespace, world: World, more: dict[str, Any]) -> dict[str, Any]:
    from megatron_share4v.evaluate.answers import read_answers
    from megatron_share4v.evaluate.result import ModelFacts
    from megatron_share4v.evaluate.runner import write_results

    if world.size > 1:
        raise ConfigError("--answers is scored by one process; start it without torchrun")
    skipped = benchmark.task.skipped(benchmark.folder)
    answers = benchmark.select(read_answers(given.answers, benchmark.every, skipped=skipped))
    model = ModelFacts.of_answers(given.answers, name=given.name)
    return write_results(benchmark, answers, model=model, judging=more["judging"], compared=more["compared"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=model_directory, metavar="CKPT")
    parser.add_argument(
        "--benchmark",
        required=True,
        help="vqav2, gqa, vizwiz, textvqa, science_qa, mme, mmbench, ... (docs/evaluation.md)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of the benchmark, or the parent of all benchmarks under their official names",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for answers.jsonl, result.json, submission/, table.md and chart.png",
    )
    parser.add_argument("--split", help="split of the benchmark (default: its first)")
    parser.add_argument("--profile", choices=[profile.value for profile in Profile], default=Profile.OFFICIAL.value)
    parser.add_argument("--limit", type=positive, help="evaluate only the first N questions")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="answer file to score instead of running a model")
    parser.add_argument("--name", help="model name in the results (default: name of its directory)")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="*",
        default=[],
        metavar="RESULT",
        help="other result.json files for table.md and chart.png",
    )
    parser.add_argument("--restart", action="store_true", help="discard the answers of an earlier run")
    local = parser.add_argument_group("model")
    local.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        help="concurrent questions (16); in fp32 the answers do not depend on it",
    )
    local.add_argument("--tensor", type=positive, default=1, help="tensor-parallel size of a replica (1)")
    local.add_argument("--dtype", choices=("fp32", "bf16"), help="default: dtype of the training run")
    local.add_argument("--workers", type=positive, default=4, help="threads that read and decode images (4)")
    remote = parser.add_argument_group(f"endpoints (keys from {KEY} and, for the judge, {JUDGE_KEY})")
    remote.add_argument("--endpoint", help="OpenAI-compatible URL of the evaluated model, including /v1")
    remote.add_argument("--endpoint-model")
    remote.add_argument(
        "--judge-base-url",
        help="URL of the judge for llava_bench and mm_vet; without it, judge requests are written to a file",
    )
    remote.add_argument("--judge-model", help="default: the official one")
    remote.add_argument("--judge-seed", type=int)
    remote.add_argument("--concurrency", type=positive, default=8, help="concurrent requests (8)")
    return parser.parse_args()


if __name__ == "__main__":
    with exit_on_closed_output():
        sys.exit(main())
