"""docs/scaling.md and its pictures: the planner's answers for the published recipes at several sizes, as tables that a test can ask for again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.observability.canvas import FAINT, PALETTE, Canvas
from megatron_share4v.planner.case import Assumptions, Case
from megatron_share4v.planner.gpus import GPUS
from megatron_share4v.planner.plot import picture
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.report import PREDICTED
from megatron_share4v.planner.search import Found, search
from megatron_share4v.planner.workload import workload_of

SAMPLES = {"pretrain": 1_246_000, "finetune": 665_298}
STAGES = {"pretrain": "stage 1", "finetune": "stage 2"}
MODELS, SIZES, LARGEST = ("share4v_7b", "share4v_13b"), (8, 16, 64, 1024), 16_384
TOKENS = ("loss.normalize=tokens",)
PACKED = (*TOKENS, "data.pack_length=4096", "data.order=random", "train.micro_batch_size=1")
LONG_PACKS, LONG_STEP = (4_096, 16_384, 65_536, 262_144), 524_288
FP8 = ("precision.fp8=tensorwise",)
BENCH_SETTINGS = (
    *PACKED, "train.global_batch_size=4", "parallel.tensor=1", "parallel.sequence=false", "parallel.overlap_grad_reduce=false",
    "precision.dtype=bf16", "optim.moments=bf16", "precision.gradients=bf16",
)  # fmt: skip
BENCH_TEXT = {"pretrain": 200, "finetune": 350}
BENCH = {"bf16": (), "fp8": FP8, "te bf16": ("transformer_engine=language",)}
BENCH |= {
    f"te fp8 {recipe}": ("transformer_engine=language", f"precision.fp8={recipe}")
    for recipe in ("tensorwise", "delayed", "blockwise")
}
PACKS = {"pretrain": 48, "finetune": 24}  # per step: about as many samples as the recipe's global batch
COLUMNS = (
    "model",
    "stage",
    "GPUs",
    "tensor",
    "context",
    "pipeline",
    "virtual",
    "data",
    "micro-batch",
    "recompute",
    "step, s",
    "tokens/s/GPU",
    "MFU",
    "hardware",
)
COLUMNS += ("bubble", "GB", "hours", "GPU-hours")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclass(frozen=True)
class Question:
    """One row: a recipe at a size."""

    model: str
    stage: str
    gpus: int
    gpu: str = "h200"
    overrides: tuple[str, ...] = ()

    def config(self, root: Path) -> RunConfig:
        """The recipe under `root`/examples, changed."""
        return load_run(root / "examples" / self.model / f"{self.stage}.yaml", self.overrides)


def ask(question: Question, root: Path, *, config: RunConfig | None = None, keep: int = 1) -> Found:
    """The best layouts for it."""
    config = config or question.config(root)
    workload = workload_of(config, samples=SAMPLES[question.stage])
    return search(
        config,
        world_size=question.gpus,
        workload=workload,
        gpu=GPUS[question.gpu],
        assumptions=Assumptions(),
        keep=keep,
    )


def row(question: Question, root: Path) -> str:
    """One line of a table; why there is none, where nothing runs."""
    found = ask(question, root)
    head = [question.model.removeprefix("share4v_").upper(), STAGES[question.stage], f"{question.gpus:,}"]
    if not found.best:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in found.refused.most_common(2))
        cells = [*head, f"none of {found.tried} runs: {reasons}"]
        return _line([*cells, *[""] * (len(COLUMNS) - len(cells))])
    [plan] = found.best
    layout, train = plan.case.layout, plan.case.config.train
    how = [
        layout.tensor,
        layout.context,
        layout.pipeline,
        layout.virtual,
        layout.data,
        train.micro_batch_size,
        train.recompute,
    ]
    shares = [f"{share:.1%}" for share in (plan.mfu, plan.hfu, plan.bubble)]
    cost = [f"{plan.needed / 1e9:.0f}", f"{plan.hours:.1f}", f"{plan.hours * layout.world_size:,.0f}"]
    return _line([*head, *how, f"{plan.step_s:.2f}", f"{plan.tokens_per_s_per_gpu:,.0f}", *shares, *cost])


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(questions: Sequence[Question], root: Path) -> str:
    """Markdown."""
    return "\n".join([HEADER, *(row(question, root) for question in questions)])


def everything(overrides: tuple[str, ...] = ()) -> list[Question]:
    """All recipes at all sizes."""
    return [Question(model, stage, gpus, overrides=overrides) for model in MODELS for stage in STAGES for gpus in SIZES]


def packed(overrides: tuple[str, ...] = ()) -> list[Question]:
    """Packs of 4,096 positions on 8 GPUs."""
    how = (*PACKED, *overrides)
    return [
        Question(model, stage, 8, overrides=(*how, f"train.global_batch_size={PACKS[stage]}"))
        for model in MODELS
        for stage in STAGES
    ]


def longer() -> list[Question]:
    """Packs of more and more positions, 524,288 of them per step, on 64 GPUs."""
    sizes = {
        length: (*PACKED, f"data.pack_length={length}", f"train.global_batch_size={LONG_STEP // length}")
        for length in LONG_PACKS
    }
    return [Question("share4v_7b", "finetune", 64, overrides=overrides) for overrides in sizes.values()]


def one_gpu(root: Path) -> Iterator[str]:
    """Rows of the table that tools/bench_gpu.py measures on one H200, by its settings and the same texts."""
    yield "| stage | variant | s/step | tokens/s | TFLOP/s | MFU | peak GB |\n|---|---|---|---|---|---|---|"
    for stage, text in BENCH_TEXT.items():
        for variant, overrides in BENCH.items():
            config = Question("share4v_7b", stage, 1, overrides=(*BENCH_SETTINGS, *overrides)).config(root)
            plan = Prediction(
                Case.of(config, world_size=1, workload=workload_of(config, text_length=text), gpu=GPUS["h200"])
            )
            speed = f"{plan.step_s:.3f} | {plan.tokens_per_s_per_gpu:,.0f} | {plan.model_tflops:.0f} | {plan.mfu:.1%}"
            yield f"| {stage} | {variant} | {speed} | {plan.needed / 1e9:.0f} |"


def breaking(root: Path) -> Iterator[str]:
    """What stands in the way of 16,384 GPUs, in the order in which one meets it."""
    question = Question("share4v_7b", "pretrain", LARGEST)
    config = question.config(root)
    train, layers = config.train, config.model.language.num_layers
    replica, widest = GPUS[question.gpu].per_server * layers, train.global_batch_size // train.micro_batch_size
    nothing = ask(question, root)
    yield (
        f"1. **The global batch.** {train.global_batch_size} samples in micro-batches of {train.micro_batch_size}, which the official averaging "
        f"makes part of the recipe, are work for {widest} data-parallel ranks. A replica has at most 8 x {layers} = {replica} GPUs (tensor inside a "
        f"server, one layer per stage), so {widest * replica:,} GPUs can have work at all: of {nothing.tried} layouts of {LARGEST:,}, "
        f"{len(nothing.best)} run."
    )
    [free], [small] = (
        ask(replace(question, gpus=gpus, overrides=overrides), root).best
        for gpus, overrides in ((LARGEST, TOKENS), (8, ()))
    )
    yield (
        f"2. **Then the work per GPU.** With `loss.normalize: tokens` the micro-batch may shrink to 1: the best layout ({_how(free)}) takes "
        f"{free.step_s:.3f} s per step at {free.mfu:.1%} MFU, {free.hours * LARGEST:,.0f} GPU-hours for what 8 GPUs do in {small.hours * 8:.0f}. A "
        "layer's kernels take less time than launching them, and the first stage, which alone has the tower, holds up the others."
    )
    batch, plan = train.global_batch_size, free
    while plan.mfu < 0.3:
        batch *= 2
        plan = ask(replace(question, overrides=(*TOKENS, f"train.global_batch_size={batch}")), root).best[0]
    yield (
        f"3. **What would carry it** is a larger global batch: 30 % MFU needs about {batch:,} samples per step ({_how(plan)}), "
        f"{math.ceil(SAMPLES['pretrain'] / batch)} steps for all of stage 1: another recipe, not a faster one. Larger models and data sets get "
        "there; this one does not want more than some hundred GPUs."
    )
    yield (
        f"4. **Not predicted here, and sure to come**: {free.case.layout.data}-wide reductions over a network shared with others, a checkpoint "
        f"written by {LARGEST:,} ranks at once, a node lost every few hours, and one slow GPU that all others wait for."
    )


def _how(plan: Prediction) -> str:
    layout = plan.case.layout
    return f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}"


def draw(root: Path, pictures: Path) -> None:
    """PNGs of less than 60 kB each."""
    for name, question in (
        ("plan_7b_8", Question("share4v_7b", "pretrain", 8)),
        ("plan_7b_64", Question("share4v_7b", "pretrain", 64, overrides=TOKENS)),
        ("plan_13b_64", Question("share4v_13b", "pretrain", 64, overrides=TOKENS)),
    ):
        found = ask(question, root, keep=20).best
        shown = found[0] if name == "plan_7b_8" else next(plan for plan in found if plan.case.layout.pipeline > 1)
        picture(
            shown, title=f"{question.model}, {STAGES[question.stage]}, {question.gpus} x H200: {shown.case.layout}"
        ).save(pictures / f"{name}.png")
    overview({question: found[0] for question in everything(TOKENS) if (found := ask(question, root).best)}).save(
        pictures / "scaling.png"
    )


def overview(plans: dict[Question, Prediction]) -> Canvas:
    """MFU of every recipe at every size, as groups of bars."""
    canvas, left, floor, high = Canvas(1000, 330), 60, 250, 190
    canvas.text(left, 12, f"MFU of the best layout on H200, any micro-batch size ({PREDICTED})", size=16)
    for part in range(6):
        y = floor - high * part / 5
        canvas.line(left, y, 980, y, fill=FAINT)
        canvas.text(left - 8, y - 7, f"{part * 10} %", size=11, align="right")
    recipes = [(model, stage) for model in MODELS for stage in STAGES]
    for group, gpus in enumerate(SIZES):
        for number, (model, stage) in enumerate(recipes):
            plan = plans.get(Question(model, stage, gpus, overrides=TOKENS))
            if plan is not None:
                x = left + 24 + group * 230 + number * 44
                canvas.box(x, floor - high * plan.mfu / 0.5, 38, high * plan.mfu / 0.5, fill=PALETTE[number])
                canvas.text(
                    x + 19, floor - high * plan.mfu / 0.5 - 16, f"{100 * plan.mfu:.0f}", size=11, align="middle"
                )
        canvas.text(left + 24 + group * 230 + 88, floor + 8, f"{gpus:,} GPUs", align="middle")
    names = [
        (f"{model.removeprefix('share4v_').upper()} {STAGES[stage]}", PALETTE[number])
        for number, (model, stage) in enumerate(recipes)
    ]
    canvas.legend(left, floor + 40, names, columns=4, width=150)
    return canvas


def document(text: str, root: Path) -> str:
    """docs/scaling.md with what stands between its marks (`<!-- plan NAME -->`, `<!-- end -->`) asked for anew."""
    kinds = [
        Question("share4v_7b", "pretrain", 64, gpu=kind, overrides=TOKENS) for kind in ("a100", "h100", "h200", "b200")
    ]
    kinds.append(Question("share4v_7b", "pretrain", 16, gpu="a100"))
    others = [
        row(question, root).replace(f"| {question.gpus} |", f"| {question.gpus} x {GPUS[question.gpu].name} |", 1)
        for question in kinds
    ]
    workloads = {
        stage: workload_of(Question("share4v_7b", stage, 8).config(root), samples=SAMPLES[stage]) for stage in STAGES
    }
    long = [
        row(question, root).replace("| stage 2 |", f"| packs of {length:,} |", 1)
        for question, length in zip(longer(), LONG_PACKS)
    ]
    parts = {
        "recipes": table(everything(), root),
        "free": table(everything(TOKENS), root),
        "packed": table(packed(), root),
        "long": "\n".join([HEADER.replace("stage", "stage 2 in", 1), *long]),
        "fp8": table(packed(FP8), root),
        "one": "\n".join(one_gpu(root)),
        "gpus": "\n".join([HEADER, *others]),
        "breaking": "\n".join(breaking(root)),
        "workloads": "\n".join(f"- {STAGES[stage]}: {workload.source}" for stage, workload in workloads.items()),
        "assumptions": "\n".join(f"- `{name}` {value:g}" for name, value in vars(Assumptions()).items()),
    }
    for name, part in parts.items():
        text, count = re.subn(
            rf"(<!-- plan {name} -->\n).*?(<!-- end -->)",
            lambda marks, part=part: f"{marks[1]}{part}\n{marks[2]}",
            text,
            flags=re.DOTALL,
        )
        assert count == 1, f"docs/scaling.md has {count} places for {name}"
    return text
