"""Benchmark of FP8 convergence: quickstart stage 1 with a larger model, BF16 against every available FP8 recipe.

    python tools/bench_fp8.py [--out DIR] [--steps N] [--variants NAME ...] [--set KEY=VALUE ...]

All variants start from the same weights on the same samples. The criterion is the largest relative gap between means of
WINDOW consecutive losses, since a single loss moves by rounding alone, as "bf16, halves" shows (the same batches in
micro-batches of half the size). Writes fp8.json, which also has the gaps of single steps, fp8.png and the run
directories to DIR. Exit code 1 when a recipe exceeds the bound, 2 when no recipe could run. Runs on the CPU at small
sizes, with the same FP8 numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_share4v.errors import PrecisionError, TrainingError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.files import read_text
from megatron_share4v.observability.charts import PALETTE, new_figure, save_png, style_axes

ROOT = Path(__file__).resolve().parents[1]
SCALED = (
    "model.language.hidden_size=1024",
    "model.language.intermediate_size=2816",
    "model.language.num_layers=16",
    "model.language.num_attention_heads=16",
    "model.language.num_key_value_heads=16",
    "model.vision.hidden_size=512",
    "model.vision.intermediate_size=1536",
    "model.vision.num_layers=8",
    "model.vision.num_attention_heads=8",
    "model.init_std=0.03",
    "optim.learning_rate=3e-4",
    "train.global_batch_size=96",
    "train.micro_batch_size=48",
)
"""Overrides of the quickstart: about 230 million weights instead of 1.4, with a matching rate and initialisation."""
ENGINE = "transformer_engine=language"
BASELINE, HALVES = "bf16", "bf16, halves"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    HALVES: (),
    "tensorwise": ("precision.fp8=tensorwise",),
    "te tensorwise": ("precision.fp8=tensorwise", ENGINE),
    "te delayed": ("precision.fp8=delayed", ENGINE),
    "te blockwise": ("precision.fp8=blockwise", ENGINE),
    "te mxfp8": ("precision.fp8=mxfp8", ENGINE),
}
USER_ERROR = 2


@dataclass(frozen=True)
class Curve:
    """Losses of a run by step, or the error message when this machine does not support the recipe."""

    variant: str
    losses: tuple[float, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class Gap:
    """Relative gap from the BF16 losses."""

    window: float
    """Largest gap of means over the window."""
    at_step: int
    """1-based step at which that window ends."""
    step: float
    """Largest gap of single steps."""
    last: float
    """Gap of the last window."""


def gap(losses: Sequence[float], reference: Sequence[float], *, window: int) -> Gap:
    """Compute the gap of two equally long loss curves of at least `window` steps."""
    measured, baseline = means(losses, window), means(reference, window)
    away = [abs(a - b) / b for a, b in zip(measured, baseline, strict=True)]
    largest = max(range(len(away)), key=away.__getitem__)
    return Gap(
        away[largest], largest + window, max(abs(a - b) / b for a, b in zip(losses, reference, strict=True)), away[-1]
    )


def means(losses: Sequence[float], window: int) -> list[float]:
    """Return the means of each `window` consecutive losses."""
    return [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]


def train(variant: str, arguments: argparse.Namespace) -> Curve:
    """Run tools/train.py from its first step. Raises TrainingError when it fails."""
    out, data = Path(arguments.out), Path(arguments.out) / "quickstart"
    directory = out / variant.replace(", ", "_").replace(" ", "_")
    overrides = [
        "parallel.tensor=1",
        "parallel.pipeline=1",
        "precision.dtype=bf16",
        f"run.directory={directory}",
        f"data.train={data / 'data' / 'pretrain'}",
        "data.validation=null",
        f"data.tokenizer={data / 'tokenizer.model'}",
        "train.validate_every_steps=0",
        "train.preview_every_steps=0",
        "log.tensorboard=false",
        f"train.steps={arguments.steps}",
        "checkpoint.every_steps=0",
        *SCALED,
        *arguments.set,
        *VARIANTS[variant],
    ]
    if variant == HALVES:
        sizes = [setting.partition("=")[2] for setting in overrides if setting.startswith("train.micro_batch_size=")]
        overrides.append(f"train.micro_batch_size={int(sizes[-1]) // 2}")
    metrics = directory / "metrics.jsonl"
    if metrics.exists():
        raise TrainingError(f"{directory} has losses of an earlier comparison; name another --out, or remove it")
    command = [sys.executable, "tools/train.py", "examples/quickstart/pretrain.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = (
        [line for line in done.stderr.splitlines() if line.startswith("error:")]
        or done.stderr.splitlines()[-1:]
        or ["no error message"]
    )
    if done.returncode == USER_ERROR and variant not in (BASELINE, HALVES):
        return Curve(variant, refused=errors[-1])
    if done.returncode:
        what = f"tools/train.py ended with exit code {done.returncode}: {errors[-1]}"
        raise TrainingError(f"{variant}: {what}; its log: {directory / 'log'}")
    return Curve(variant, tuple(json.loads(line)["loss"] for line in read_text(metrics).splitlines()))


def compare(arguments: argparse.Namespace) -> dict:
    """Run all variants in sequence, write the results, and return them."""
    out = Path(arguments.out)
    scenes = [] if arguments.scenes is None else ["--train-scenes", str(arguments.scenes), "--held-out-scenes", "64"]
    subprocess.run(
        [sys.executable, "examples/quickstart/make_data.py", "--out", str(out / "quickstart"), *scenes],
        cwd=ROOT,
        check=True,
    )
    result: dict = {name: getattr(arguments, name) for name in ("steps", "window", "bound")}
    result |= {"settings": [*SCALED, *arguments.set], "variants": {}}
    curves: list[Curve] = []
    for variant in dict.fromkeys((BASELINE, *arguments.variants)):
        curve = train(variant, arguments)
        curves.append(curve)
        entry = asdict(curve)
        if curve.losses:
            entry["gap"] = asdict(gap(curve.losses, curves[0].losses, window=arguments.window))
        result["variants"][variant] = entry
        print(f"{variant:<15}" + (f"not run: {curve.refused}" if curve.refused else _line(entry)), flush=True)
    judged = {
        name: entry["gap"]["window"]
        for name, entry in result["variants"].items()
        if "gap" in entry and name not in (BASELINE, HALVES)
    }
    result |= {
        "largest_gap": max(judged.values(), default=None),
        "holds": bool(judged) and all(found <= arguments.bound for found in judged.values()),
    }
    (out / "fp8.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw([curve for curve in curves if curve.losses], arguments.window, out / "fp8.png")
    return result


def _line(entry: dict) -> str:
    found, losses = entry["gap"], entry["losses"]
    away = f"at most {found['window']:.3%} (step {found['at_step']}), "
    away += f"single steps {found['step']:.3%}, last {found['last']:.3%}"
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; from bf16 {away}"


def draw(curves: Sequence[Curve], window: int, path: Path) -> None:
    """Plot the losses (means of `window` steps) above, their relative distance from BF16 below."""
    smooth = {curve.variant: means(curve.losses, window) for curve in curves}
    distance = {
        name: [100 * abs(a - b) / b for a, b in zip(line, smooth[BASELINE])]
        for name, line in smooth.items()
        if name != BASELINE
    }
    colours = dict(zip(smooth, PALETTE))
    figure = new_figure(900, 560)
    above, below = figure.subplots(2, 1)
    for axes, lines, label in (
        (above, smooth, f"loss, mean of {window} steps"),
        (below, distance, "distance from bf16, %"),
    ):
        for name, line in lines.items():
            axes.plot(line, color=colours[name], label=name, linewidth=1)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        style_axes(axes)
    below.set_xlabel("step")
    above.legend(ncols=3, fontsize=8, frameon=False)
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu/fp8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--bound", type=float, default=0.01, help="largest relative gap that is accepted")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--scenes", type=int, help="number of training scenes; default: the quickstart's 6,000")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the configuration"
    )
    arguments = parser.parse_args()
    with exit_on_user_error():
        if not 0 < arguments.window <= arguments.steps:
            raise TrainingError(
                f"--window {arguments.window} of --steps {arguments.steps}: give at least 1 and at most "
                "as many as there are steps"
            )
        result = compare(arguments)
        if result["largest_gap"] is None:
            raise PrecisionError(f"no FP8 recipe could be tried: {arguments.out}/fp8.json has the reason of each")
    print(
        f"largest gap {result['largest_gap']:.3%}, bound {arguments.bound:.2%}: "
        + ("holds" if result["holds"] else "DOES NOT HOLD")
    )
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
