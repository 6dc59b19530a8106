"""Formatting of predictions as text and JSON; plot.py draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_share4v.planner.memory import weight_shapes
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.search import SearchResult

PREDICTED = "predicted, not measured"
COLUMNS = {
    "tensor": 7, "context": 8, "pipeline": 9, "virtual": 8, "data": 6, "micro": 6, "recompute": 11, "step, s": 9,
    "MFU": 7, "bubble": 8, "GB": 7, "hours": 7, "GPU-h": 8,
}  # fmt: skip
CLASSES = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


def format_report(requested: Prediction | None, refusals: Sequence[str], found: SearchResult, *, title: str) -> str:
    """Format the whole report.

    requested: prediction for the layout of the configuration, None if it cannot be built (`refusals` has the reasons).
    """
    lines = [f"{title}: {PREDICTED}"]
    lines += ["", *(f"refused: {reason}" for reason in refusals)] if refusals else []
    if requested is not None:
        lines += ["", *_describe_requested(requested)]
    lines += ["", *ranking(found)]
    first = requested or next(iter(found.best), None)
    if first is not None:
        lines += ["", *_assumptions(first)]
    return "\n".join(lines) + "\n"


def _describe_requested(plan: Prediction) -> Iterator[str]:
    case = plan.case
    train, traffic = case.config.train, plan.traffic
    weights = [
        entry
        for stage in range(len(case.counts))
        for entry in weight_shapes(case.config.model, case.chunk(stage), tensor=1)
    ]
    total, trained = (
        sum(elements * count * (trains or everything) for elements, count, trains in weights)
        for everything in (True, False)
    )
    yield (f"model     {total / 1e6:,.0f} M weights, {trained / 1e6:,.0f} M trainable, {case.config.precision.dtype}")
    yield f"workload  {case.workload.source}"
    sequence = ", sequence parallel" if case.config.parallel.sequence else ""
    yield f"layout    {case.layout}{sequence}, recompute {train.recompute}"
    yield (
        f"batch     {train.global_batch_size} in micro-batches of {train.micro_batch_size}, {case.micro_batches} on "
        "each data-parallel rank"
    )
    yield ""
    yield (
        f"{'rank':>4} {'layers':<12}"
        + "".join(f"{name:>12}" for name in CLASSES)
        + f"{'sum, GB':>10}{'fwd, ms':>9}{'bwd, ms':>9}"
    )
    for rank, memory in enumerate(plan.memory):
        sizes = "".join(f"{getattr(memory, name) / 1e9:>12.2f}" for name in CLASSES)
        forward, backward = (1000 * sum(plan.stages[stage][kind] for stage in case.stages(rank)) for kind in (0, 1))
        yield f"{rank:>4} {_contents(plan, rank):<12}{sizes}{memory.total / 1e9:>10.1f}{forward:>9.1f}{backward:>9.1f}"
    needed, limit = plan.needed / 1e9, case.gpu.memory / 1e9
    yield (
        f"     peak rank, with {case.assumptions.fragments:.0%} fragmentation and a reserve: {needed:.1f} GB of "
        f"{limit:.0f}"
    )
    yield ""
    yield (
        f"step      {plan.step_s:.3f} s: pipeline {plan.pipeline_s:.3f} (bubble {plan.bubble:.1%}, slowest rank "
        f"{plan.imbalance:.1%} over the mean), "
        f"gradients and update {plan.after_s:.3f}"
    )
    yield "messages  per rank and step: " + ", ".join(
        f"{axis} {size / 1e9:.2f} GB" for axis, size in vars(traffic).items()
    )
    speed = f"{plan.tokens_per_s_per_gpu:,.0f} tokens/s, {plan.model_tflops:.0f} model TFLOP/s per GPU"
    yield f"speed     {speed}; {plan.utilisation}, hardware {plan.hfu:.1%}"
    yield f"run       {format_duration(plan)}"


def _contents(plan: Prediction, rank: int) -> str:
    """Decoder layers of each chunk of a rank, with T for tower, projector and embedding, and H for the head."""
    chunks = [plan.case.chunk(stage) for stage in plan.case.stages(rank)]
    return "+".join(f"{'T' * chunk.first}{chunk.layers}{'H' * chunk.last}" for chunk in chunks)


def format_duration(plan: Prediction) -> str:
    """Steps, hours and GPU-hours as text; a hint when the number of samples is unknown."""
    if plan.hours is None:
        return "hours unknown: give --samples or the prepared data set"
    gpus = plan.case.layout.world_size
    return (
        f"{plan.steps:,} steps, {plan.hours:.1f} h, {plan.hours * gpus:,.0f} GPU-hours, excluding validation, "
        "checkpoints and restarts"
    )


def ranking(found: SearchResult) -> Iterator[str]:
    """Yield a table of the fastest layouts, then the counted reasons for refused ones."""
    yield f"fastest of {found.tried} layouts that were tried:"
    if found.best:
        yield "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    for plan in found.best:
        layout, hours = plan.case.layout, plan.hours
        time = f"{hours:>7.1f}{hours * layout.world_size:>8,.0f}" if hours is not None else f"{'-':>7}{'-':>8}"
        yield (
            f"{layout.tensor:>7}{layout.context:>8}{layout.pipeline:>9}{layout.virtual:>8}{layout.data:>6}"
            f"{plan.case.config.train.micro_batch_size:>6}"
            f"{plan.case.config.train.recompute:>11}{plan.step_s:>9.3f}{plan.mfu:>7.1%}{plan.bubble:>8.1%}"
            f"{plan.needed / 1e9:>7.1f}{time}"
        )
    for reason, count in found.refused.most_common():
        yield f"{count:>7} refused: {reason}"


_FP8_NATIVE = (
    "Native FP8: one 8-bit copy of each input is saved; weights are cast for each micro-batch (memory measured on CPU)."
)
_FP8_TRANSFORMER_ENGINE = (
    "Transformer Engine (from the source of its 2.20, not measured): one 8-bit copy of the local rows of each input is "
    "saved and two of each weight, cast once per step; all recipes have the same speed; block scales are stored beside "
    "the codes."
)


def _assumptions(plan: Prediction) -> Iterator[str]:
    case, gpu, assumed = plan.case, plan.case.gpu, plan.case.assumptions
    yield (
        f"assumed: {gpu.name} with {gpu.bf16 / 1e12:.0f} TFLOP/s in BF16, {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{gpu.link / 1e9:.0f} GB/s between "
        f"{gpu.per_server} GPUs of a server, {gpu.network / 1e9:.0f} GB/s each to other servers;"
    )
    yield (
        f"  reached: {assumed.matrices:.0%} in wide matrix products, {assumed.attention:.0%} in attention, "
        f"{assumed.memory:.0%} of the "
        f"memory bandwidth, {assumed.links:.0%} of the link bandwidth;"
    )
    collective, layer, step = assumed.collective_s * 1e6, assumed.layer_s * 1e6, assumed.step_s * 1e3
    yield f"  {collective:.0f} us per collective, {layer:.0f} us per layer at least, {step:.0f} ms per step."
    if case.config.precision.fp8 != "none" and gpu.fp8:
        yield (
            f"  FP8: {gpu.fp8 / 1e12:.0f} TFLOP/s, of which {assumed.fp8:.0%} in matrix products of FP8 layers; all "
            "other products run in BF16."
        )
        yield f"  {_FP8_TRANSFORMER_ENGINE if case.settings.fp8.engine else _FP8_NATIVE}"
    hidden = (
        "hidden behind the last backward pass"
        if case.config.parallel.overlap_grad_reduce
        else "not hidden (parallel.overlap_grad_reduce is off)"
    )
    yield (
        f"  Tensor- and context-parallel communication is not overlapped; the gradient reduction is {hidden}; data "
        "loading never delays a step."
    )


def prediction_to_json(plan: Prediction) -> dict[str, Any]:
    """All predicted values of one layout as JSON values, in bytes and seconds."""
    case = plan.case
    return {
        "layout": asdict(case.layout)
        | {
            "sequence": case.config.parallel.sequence,
            "micro_batch_size": case.config.train.micro_batch_size,
            "recompute": case.config.train.recompute,
        },
        "micro_batches": case.micro_batches,
        "layers_per_stage": list(case.counts),
        "memory": [vars(memory) for memory in plan.memory],
        "needed_bytes": plan.needed,
        "stage_seconds": [{"forward": forward, "backward": backward} for forward, backward in plan.stages],
        "step_s": plan.step_s,
        "pipeline_s": plan.pipeline_s,
        "after_pipeline_s": plan.after_s,
        "bubble": plan.bubble,
        "imbalance": plan.imbalance,
        "traffic_bytes": vars(plan.traffic),
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "model_tflops_per_s_per_gpu": plan.model_tflops,
        "mfu": plan.mfu,
        "mfu_is_of": "bf16",
        "mfu_of_fp8_peak": plan.fp8_mfu,
        "hfu": plan.hfu,
        "steps": plan.steps,
        "hours": plan.hours,
        "gpu_hours": None if plan.hours is None else plan.hours * case.layout.world_size,
    }


def report_to_json(
    requested: Prediction | None, refusals: Sequence[str], found: SearchResult, *, title: str
) -> dict[str, Any]:
    """The whole report as JSON values."""
    first = requested or next(iter(found.best), None)
    return {
        "title": title,
        "status": PREDICTED,
        "refusals": list(refusals),
        "requested": None if requested is None else prediction_to_json(requested),
        "best": [prediction_to_json(plan) for plan in found.best],
        "refused": dict(found.refused),
        "tried": found.tried,
        "gpu": None if first is None else asdict(first.case.gpu),
        "assumptions": None if first is None else asdict(first.case.assumptions),
        "workload": None if first is None else asdict(first.case.workload),
    }
