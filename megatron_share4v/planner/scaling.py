"""Tables and pictures of docs/scaling.md: the planner's predictions for the published recipes at several numbers of
GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.observability.charts import PALETTE, new_figure, save_png, style_axes
from megatron_share4v.planner.case import Assumptions, Case
from megatron_share4v.planner.gpus import GPUS
from megatron_share4v.planner.plot import draw_prediction
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.report import PREDICTED
from megatron_share4v.planner.search import SearchResult, search
from megatron_share4v.planner.workload import assumed_workload

if TYPE_CHECKING:
    from megatron_share4v.observability.charts import Figure

SAMPLES = {"pretrain": 1_246_000, "finetune": 665_298}
STAGES = {"pretrain": "stage 1", "finetune": "stage 2"}
MODELS = ("share4v_7b", "share4v_13b")
SIZES = (8, 16, 64)
TOO_LARGE = 1024
"""GPUs on which no recipe runs efficiently: listed as a warning, not in a table."""
LARGEST = 16_384
MAX_BUBBLE = 0.25
"""Largest pipeline bubble of a layout that a table recommends."""
TOKENS = ("loss.normalize=tokens",)
PACKED = (*TOKENS, "data.pack_length=4096", "data.order=random", "train.micro_batch_size=1")
LONG_PACKS, TOO_LONG, LONG_STEP = (4_096, 16_384, 65_536), 262_144, 524_288
FP8 = ("precision.fp8=tensorwise",)
BENCH_SETTINGS = (
    *PACKED, "train.global_batch_size=4", "parallel.tensor=1", "parallel.sequence=false",
    "parallel.overlap_grad_reduce=false",
    "precision.dtype=bf16", "optim.moments=bf16", "precision.gradients=bf16",
)  # fmt: skip
BENCH_TEXT = {"pretrain": 200, "finetune": 350}
BENCH: dict[str, tuple[str, ...]] = {"bf16": (), "fp8": FP8, "te bf16": ("transformer_engine=language",)}
BENCH |= {
    f"te fp8 {recipe}": ("transformer_engine=language", f"precision.fp8={recipe}")
    for recipe in ("tensorwise", "delayed", "blockwise")
}
PACKS = {"pretrain": 48, "finetune": 24}
"""Packs in a step: about as many samples as the global batch of the recipe."""
COLUMNS = (
    "model", "stage", "GPUs", "tensor", "context", "pipeline", "virtual", "data", "micro-batch", "recompute", "step, "
    "s", "tokens/s/GPU",
    "MFU", "hardware", "bubble", "GB", "hours", "GPU-hours",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclass(frozen=True)
class PlannedRun:
    """A recipe of examples/ on a number of GPUs: one row of a table."""

    model: str
    stage: str
    gpus: int
    gpu: str = "h200"
    overrides: tuple[str, ...] = ()

    def load_config(self, root: Path) -> RunConfig:
        """Configuration of the recipe in `root`/examples with the overrides applied."""
        return load_run(root / "examples" / self.model / f"{self.stage}.yaml", self.overrides)

    @property
    def model_name(self) -> str:
        """Size of the model as printed, such as 7B."""
        return self.model.removeprefix("share4v_").upper()


def search_layouts(run: PlannedRun, root: Path, *, keep: int = 1) -> SearchResult:
    """Find the `keep` fastest layouts of a run."""
    config = run.load_config(root)
    workload = assumed_workload(config, samples=SAMPLES[run.stage])
    gpu = GPUS[run.gpu]
    return search(config, world_size=run.gpus, workload=workload, gpu=gpu, assumptions=Assumptions(), keep=keep)


def fastest_layout(run: PlannedRun, root: Path) -> Prediction:
    """Prediction for the fastest layout of a run that has one."""
    [best] = search_layouts(run, root).best
    return best


def run_hours(prediction: Prediction) -> float:
    """Hours of a whole run whose number of samples is known."""
    assert prediction.hours is not None
    return prediction.hours


def table_row(run: PlannedRun, root: Path) -> str:
    """Markdown row for the fastest layout of a run; the reasons for refusal when none can run."""
    found = search_layouts(run, root)
    head = [run.model_name, STAGES[run.stage], f"{run.gpus:,}"]
    if not found.best:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in found.refused.most_common(2))
        cells = [*head, f"none of {found.tried} runs: {reasons}"]
        return _markdown_row([*cells, *[""] * (len(COLUMNS) - len(cells))])
    [best] = found.best
    layout, train, hours = best.case.layout, best.case.config.train, run_hours(best)
    sizes = [layout.tensor, layout.context, layout.pipeline, layout.virtual, layout.data]
    shares = [f"{share:.1%}" for share in (best.mfu, best.hfu, best.bubble)]
    speed = [f"{best.step_s:.2f}", f"{best.tokens_per_s_per_gpu:,.0f}"]
    cost = [f"{best.needed / 1e9:.0f}", f"{hours:.1f}", f"{hours * layout.world_size:,.0f}"]
    return _markdown_row([*head, *sizes, train.micro_batch_size, train.recompute, *speed, *shares, *cost])


def _markdown_row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def markdown_table(runs: Sequence[PlannedRun], root: Path) -> str:
    """Header and one row for each run."""
    return "\n".join([HEADER, *(table_row(run, root) for run in runs)])


def recipe_runs(overrides: tuple[str, ...] = (), *, sizes: Sequence[int] = SIZES) -> list[PlannedRun]:
    """All recipes at all numbers of GPUs."""
    return [
        PlannedRun(model, stage, gpus, overrides=overrides) for model in MODELS for stage in STAGES for gpus in sizes
    ]


def packed_runs(overrides: tuple[str, ...] = ()) -> list[PlannedRun]:
    """All recipes with packs of 4,096 positions on 8 GPUs."""
    settings = (*PACKED, *overrides)
    return [
        PlannedRun(model, stage, 8, overrides=(*settings, f"train.global_batch_size={PACKS[stage]}"))
        for model in MODELS
        for stage in STAGES
    ]


def long_context_run(pack_length: int) -> PlannedRun:
    """Stage 2 of the 7B model with packs of `pack_length`, 524,288 positions per step, on 64 GPUs."""
    batch = f"train.global_batch_size={LONG_STEP // pack_length}"
    return PlannedRun("share4v_7b", "finetune", 64, overrides=(*PACKED, f"data.pack_length={pack_length}", batch))


def bench_rows(root: Path) -> Iterator[str]:
    """Rows of the table that tools/bench_gpu.py measures on one H200, with the same settings and text lengths."""
    yield "| stage | variant | s/step | tokens/s | TFLOP/s | MFU | peak GB |\n|---|---|---|---|---|---|---|"
    for stage, text in BENCH_TEXT.items():
        for variant, overrides in BENCH.items():
            config = PlannedRun("share4v_7b", stage, 1, overrides=(*BENCH_SETTINGS, *overrides)).load_config(root)
            workload = assumed_workload(config, text_length=text)
            plan = Prediction(Case.of(config, world_size=1, workload=workload, gpu=GPUS["h200"]))
            speed = f"{plan.step_s:.3f} | {plan.tokens_per_s_per_gpu:,.0f} | {plan.model_tflops:.0f} | {plan.mfu:.1%}"
            yield f"| {stage} | {variant} | {speed} | {plan.needed / 1e9:.0f} |"


def inefficient_runs(root: Path) -> Iterator[str]:
    """Warnings about runs whose fastest layout wastes most of its GPUs, with the GPU-hours of the efficient size."""
    for model in MODELS:
        for overrides in ((), TOKENS):
            run = PlannedRun(model, "pretrain", TOO_LARGE, overrides=overrides)
            best, small = fastest_layout(run, root), fastest_layout(replace(run, gpus=SIZES[0]), root)
            setting = "`loss.normalize: tokens`" if overrides else "the recipe's micro-batch"
            yield (
                f"- **{run.model_name} {STAGES[run.stage]} on {TOO_LARGE:,} GPUs, {setting}**: bubble "
                f"{best.bubble:.1%}, MFU {best.mfu:.1%}, "
                f"{run_hours(best) * TOO_LARGE:,.0f} GPU-hours for what {SIZES[0]} GPUs do in "
                f"{run_hours(small) * SIZES[0]:,.0f}."
            )
    best = fastest_layout(long_context_run(TOO_LONG), root)
    yield (
        f"- **7B stage 2 in packs of {TOO_LONG:,} on 64 GPUs**: {LONG_STEP // TOO_LONG} packs per step leave a bubble "
        f"of {best.bubble:.1%} and "
        f"{best.mfu:.1%} MFU ({_describe_layout(best)}). Raise the global batch or take fewer GPUs."
    )


def large_scale_limits(root: Path) -> Iterator[str]:
    """Limits that a run on 16,384 GPUs meets, in the order in which it meets them."""
    run = PlannedRun("share4v_7b", "pretrain", LARGEST)
    config = run.load_config(root)
    train, layers = config.train, config.model.language.num_layers
    per_server = GPUS[run.gpu].per_server
    replica, widest = per_server * layers, train.global_batch_size // train.micro_batch_size
    found = search_layouts(run, root)
    yield (
        f"1. **The global batch.** {train.global_batch_size} samples in micro-batches of {train.micro_batch_size}, "
        "which the official averaging "
        f"makes part of the recipe, occupy at most {widest} data-parallel ranks. A replica has at most {per_server} x "
        f"{layers} = {replica} GPUs "
        f"(tensor parallelism inside a server, one layer per stage), so at most {widest * replica:,} GPUs have work: "
        f"of {found.tried} layouts of "
        f"{LARGEST:,}, {len(found.best)} run."
    )
    free = fastest_layout(replace(run, overrides=TOKENS), root)
    small = fastest_layout(replace(run, gpus=8), root)
    yield (
        "2. **Work per GPU.** With `loss.normalize: tokens` the micro-batch may shrink to 1: the best layout "
        f"({_describe_layout(free)}) takes "
        f"{free.step_s:.3f} s per step at {free.mfu:.1%} MFU, {run_hours(free) * LARGEST:,.0f} GPU-hours for what 8 "
        "GPUs do in "
        f"{run_hours(small) * 8:.0f}. The kernels of a layer take less time than their launches, and the first stage, "
        "which alone has the vision "
        "tower, delays the others."
    )
    batch, plan = train.global_batch_size, free
    while plan.mfu < 0.3:
        batch *= 2
        plan = fastest_layout(replace(run, overrides=(*TOKENS, f"train.global_batch_size={batch}")), root)
    yield (
        f"3. **A larger global batch** would be needed: 30 % MFU takes about {batch:,} samples per step "
        f"({_describe_layout(plan)}), "
        f"{math.ceil(SAMPLES['pretrain'] / batch)} steps for all of stage 1, which is a different recipe. Only larger "
        "models and data sets "
        "justify this size; these recipes gain nothing beyond some hundred GPUs."
    )
    yield (
        f"4. **Not predicted here**: {free.case.layout.data}-wide reductions over a network shared with other jobs, a "
        "checkpoint "
        f"written by {LARGEST:,} ranks at once, a node lost every few hours, and one slow GPU that all others wait for."
    )


def _describe_layout(plan: Prediction) -> str:
    layout = plan.case.layout
    return f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}"


def draw_pictures(root: Path, folder: Path) -> None:
    """Write the PNGs of docs/scaling.md to `folder`."""
    for name, run in (
        ("plan_7b_8", PlannedRun("share4v_7b", "pretrain", 8)),
        ("plan_7b_64", PlannedRun("share4v_7b", "pretrain", 64, overrides=TOKENS)),
        ("plan_13b_64", PlannedRun("share4v_13b", "pretrain", 64, overrides=TOKENS)),
    ):
        best = search_layouts(run, root, keep=20).best
        shown = best[0] if name == "plan_7b_8" else next(plan for plan in best if plan.case.layout.pipeline > 1)
        title = f"{run.model}, {STAGES[run.stage]}, {run.gpus} x H200: {shown.case.layout}"
        save_png(draw_prediction(shown, title=title), folder / f"{name}.png")
    runs = recipe_runs(TOKENS, sizes=(*SIZES, TOO_LARGE))
    save_png(draw_overview({run: fastest_layout(run, root) for run in runs}), folder / "scaling.png")


def draw_overview(plans: dict[PlannedRun, Prediction]) -> Figure:
    """MFU of every recipe at every number of GPUs, as groups of bars."""
    figure = new_figure(1000, 340)
    axes = figure.subplots()
    sizes = sorted({run.gpus for run in plans})
    recipes = list(dict.fromkeys((run.model, run.stage) for run in plans))
    width = 0.8 / len(recipes)
    for number, recipe in enumerate(recipes):
        runs = [run for run in plans if (run.model, run.stage) == recipe]
        x = [sizes.index(run.gpus) + (number - (len(recipes) - 1) / 2) * width for run in runs]
        label = f"{runs[0].model_name} {STAGES[runs[0].stage]}"
        mfu = [100 * plans[run].mfu for run in runs]
        bars = axes.bar(x, mfu, 0.9 * width, color=PALETTE[number], label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_title(f"MFU of the best layout on H200, any micro-batch size ({PREDICTED})", fontsize=11)
    axes.set_xticks(range(len(sizes)), [f"{gpus:,} GPUs" for gpus in sizes])
    axes.set_ylabel("MFU, %")
    style_axes(axes)
    axes.legend(fontsize=8, frameon=False)
    return figure


def document_parts(root: Path) -> dict[str, str]:
    """Generated parts of docs/scaling.md by the name in their marks."""
    kinds = [
        PlannedRun("share4v_7b", "pretrain", 64, gpu=kind, overrides=TOKENS)
        for kind in ("a100", "h100", "h200", "b200")
    ]
    kinds.append(PlannedRun("share4v_7b", "pretrain", 16, gpu="a100"))
    others = [
        table_row(run, root).replace(f"| {run.gpus} |", f"| {run.gpus} x {GPUS[run.gpu].name} |", 1) for run in kinds
    ]
    long = [
        table_row(long_context_run(length), root).replace("| stage 2 |", f"| packs of {length:,} |", 1)
        for length in LONG_PACKS
    ]
    workloads = {
        name: assumed_workload(PlannedRun("share4v_7b", stage, 8).load_config(root), samples=SAMPLES[stage])
        for stage, name in STAGES.items()
    }
    return {
        "recipes": markdown_table(recipe_runs(), root),
        "free": markdown_table(recipe_runs(TOKENS), root),
        "packed": markdown_table(packed_runs(), root),
        "long": "\n".join([HEADER.replace("stage", "stage 2 in", 1), *long]),
        "fp8": markdown_table(packed_runs(FP8), root),
        "one": "\n".join(bench_rows(root)),
        "gpus": "\n".join([HEADER, *others]),
        "avoid": "\n".join(inefficient_runs(root)),
        "breaking": "\n".join(large_scale_limits(root)),
        "workloads": "\n".join(f"- {name}: {workload.source}" for name, workload in workloads.items()),
        "assumptions": "\n".join(f"- `{name}` {value:g}" for name, value in vars(Assumptions()).items()),
    }


def update_document(text: str, root: Path) -> str:
    """docs/scaling.md with new text between its marks `<!-- plan NAME -->` and `<!-- end -->`."""
    for name, part in document_parts(root).items():
        begin, end = f"<!-- plan {name} -->\n", "<!-- end -->"
        assert text.count(begin) == 1, f"docs/scaling.md has {text.count(begin)} places for {name}"
        before, rest = text.split(begin)
        text = f"{before}{begin}{part}\n{end}{rest.split(end, 1)[1]}"
    return text
