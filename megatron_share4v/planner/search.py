"""Search over the layouts of a world size: the fastest ones, and the reasons for refused ones."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from pydantic import ValidationError

from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.planner.case import Assumptions, Case
from megatron_share4v.planner.gpus import Gpu
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.workload import Workload

CHUNKS = (1, 2, 4)


@dataclass(frozen=True)
class SearchResult:
    """The fastest layouts, and how many were refused for which reason."""

    best: list[Prediction]
    refused: Counter[str]
    tried: int


def search(
    config: RunConfig, *, world_size: int, workload: Workload, gpu: Gpu, assumptions: Assumptions, keep: int
) -> SearchResult:
    """Search over tensor and, for packs, context (together inside a server), pipeline, virtual, micro-batch size and
    whether layers are recomputed; everything else as `config` says, sequence parallelism with tensor.

    The global batch is never changed. With `loss.normalize: microbatch` the micro-batch size is part of the recipe and
    is not changed either.
    """
    refused: Counter[str] = Counter()
    fitting: list[Prediction] = []
    tried = 0
    for candidate in _candidates(config, world_size, gpu):
        tried += 1
        try:
            prediction = Prediction(
                Case.of(
                    replace(config, **candidate),
                    world_size=world_size,
                    workload=workload,
                    gpu=gpu,
                    assumptions=assumptions,
                )
            )
        except (
            ValidationError,
            ConfigError,
        ) as error:  # the first: values that the configuration itself refuses together
            refused[_kind(str(error))] += 1
            continue
        if (reason := next(prediction.refusals(), None)) is not None:
            refused[f"does not fit {gpu.name}" if reason.startswith("does not fit") else reason] += 1
        else:
            fitting.append(prediction)
    return SearchResult(_fastest(fitting, keep), refused, tried)


def _fastest(fitting: list[Prediction], keep: int) -> list[Prediction]:
    """Simulate only candidates whose lower bound could be among the fastest."""
    best: list[tuple[float, int, Prediction]] = []
    for number, prediction in enumerate(sorted(fitting, key=lambda prediction: prediction.least_step_s)):
        if len(best) == keep and prediction.least_step_s >= -best[0][0]:
            break
        heapq.heappush(best, (-prediction.step_s, -number, prediction))
        if len(best) > keep:
            heapq.heappop(best)
    return [prediction for *_, prediction in sorted(best, key=lambda entry: (-entry[0], -entry[1]))]


def _candidates(config: RunConfig, world_size: int, gpu: Gpu) -> Iterator[dict]:
    """Yield the changed sections of each candidate; invalid ones raise when a configuration is built from them."""
    sizes = (
        [config.train.micro_batch_size]
        if config.loss.normalize == "microbatch"
        else _powers(config.train.global_batch_size)
    )
    recompute = list(dict.fromkeys((config.train.recompute, "none", "full")))
    contexts = sorted({config.parallel.context, 1, *(_powers(gpu.per_server) if config.data.pack_length else ())})
    for tensor, context in (
        (tensor, context)
        for tensor in _powers(gpu.per_server)
        for context in contexts
        if tensor * context <= gpu.per_server
    ):
        for pipeline in (
            size
            for size in range(1, config.model.language.num_layers + 1)
            if world_size % (tensor * context * size) == 0
        ):
            for virtual in CHUNKS if pipeline > 1 else (1,):
                own = config.parallel.layout  # made for so many stages alone
                layout = own if own == "auto" or len(own) == pipeline * virtual else "auto"
                degrees = dict(
                    tensor=tensor,
                    context=context,
                    pipeline=pipeline,
                    virtual=virtual,
                    sequence=tensor > 1,
                    layout=layout,
                )
                parallel = replace(config.parallel, **degrees)
                for size, again in product(sizes, recompute):
                    if config.train.global_batch_size % size == 0:
                        layers = config.train.recompute_layers if again == "full" == config.train.recompute else None
                        yield {
                            "parallel": parallel,
                            "train": replace(
                                config.train, micro_batch_size=size, recompute=again, recompute_layers=layers
                            ),
                        }


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]


def _kind(message: str) -> str:
    """Strip the numbers from a reason, so that reasons of one kind are counted together."""
    for words, kind in (
        ("x parallel.context", "parallel.tensor x parallel.context does not divide the heads"),
        ("is not divisible by parallel.tensor", "parallel.tensor does not divide the model"),
        ("do not divide each other", "parallel.tensor does not divide the model"),
        ("exceeds model.language.num_layers", "more stages than layers"),
        (
            "interleaved schedule needs",
            "micro-batches per rank are no multiple of parallel.pipeline, as parallel.virtual needs",
        ),
        (
            "train.global_batch_size",
            "the global batch does not divide into micro-batches for so many data-parallel ranks",
        ),
        ("world size", "the world does not divide"),
    ):
        if words in message:
            return kind
    return message
