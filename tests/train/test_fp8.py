"""FP8 layers: a tiny model learns as in bf16, also with TP, and the divergence check measures and limits the gap."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from harness import run_world
from small_run import Setting
from tolerances import FP8_CURVE, FP8_LAYOUT_LOSS

STEPS = 80
BF16 = Setting(dtype="bf16", language_layers=4, language_hidden=64, language_width=128, learning_rate=1e-3, ops="auto")
FP8 = replace(BF16, fp8=(("fp8", "tensorwise"),))
VARIANTS = {
    "bf16": BF16,
    "fp8": FP8,
    "precise": replace(FP8, fp8=(*FP8.fp8, ("fp8_weight_gradient", "dtype"))),
    "first and last": replace(FP8, fp8=(*FP8.fp8, ("fp8_first_layers", 1), ("fp8_last_layers", 1))),
    "tower": replace(FP8, fp8=(*FP8.fp8, ("fp8_tower", True))),
}
TENSOR = {
    "bf16": replace(BF16, tensor=2, sequence=True),
    "fp8": replace(FP8, tensor=2, sequence=True),
    "fp8, plain": replace(FP8, tensor=2),
}


@dataclass(frozen=True)
class Learned:
    """Losses by step, number of FP8 matrices, and the relative gaps of the divergence check at the end."""

    losses: list[float]
    matrices: int
    gaps: tuple[float, float]
    refused: str


def learn(variants: dict[str, Setting], steps: int) -> dict[str, Learned]:
    """Train each variant on the same few batches."""
    from small_run import Run
    from tiny import MICRO_BATCH, micro_batches, step_items

    from megatron_share4v.errors import PrecisionError
    from megatron_share4v.mcore.backends import select_ops_backend
    from megatron_share4v.mcore.fp8 import _Fp8Linear
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout
    from megatron_share4v.resilience.fp8_divergence import Fp8DivergenceCheck
    from megatron_share4v.train.data_feed import StepData
    from megatron_share4v.train.step import StepSettings, compute_gradients

    results = {}
    for name, setting in variants.items():
        with open_mesh(Layout(tensor=setting.tensor), device=Device("cpu")) as mesh:
            setting = replace(setting, ops=select_ops_backend("auto", mesh=mesh).implementation)
            run = Run(mesh, setting, seed=1)
            losses = [loss for _ in range(steps // 4) for loss, _ in run.train(0, 4)]
            data = StepData(step_items(0), micro_batches(0)[:1], 0.0)
            watched = replace(run.precision, guard_every_steps=1) if setting.fp8 else run.precision
            settings = StepSettings(mesh=mesh, micro_batch_size=MICRO_BATCH)

            def measure(run=run, data=data, settings=settings) -> tuple[float, float]:
                gradients = compute_gradients(run.chunks, run.optimizer, data, settings=settings)
                return gradients.loss, gradients.norm

            check, refused = Fp8DivergenceCheck(precision=watched, chunks=run.chunks), ""
            gap = check.check(1, measure) if check.is_due(1) else None
            try:
                if gap is not None:
                    strict = replace(watched, guard_loss_gap=1e-9)
                    Fp8DivergenceCheck(precision=strict, chunks=run.chunks).check(1, measure)
            except PrecisionError as error:
                refused = str(error)
            matrices = sum(isinstance(module, _Fp8Linear) for module in run.bare[0].modules())
            results[name] = Learned(losses, matrices, (gap.loss, gap.grad_norm) if gap else (0.0, 0.0), refused)
    return results


@pytest.fixture(scope="module")
def learned() -> dict[str, Learned]:
    return run_world(1, learn, VARIANTS, STEPS)[0]


def test_selected_matrices_are_in_fp8(learned: dict[str, Learned]) -> None:
    # Four in each of 4 decoder layers, and in each of 2 tower blocks.
    assert {name: one.matrices for name, one in learned.items()} == {
        "bf16": 0,
        "fp8": 16,
        "precise": 16,
        "first and last": 8,
        "tower": 24,
    }


def test_fp8_converges_like_bf16(learned: dict[str, Learned]) -> None:
    truth = torch.tensor(learned["bf16"].losses)
    assert truth[-4:].mean() < 0.5 * truth[:4].mean(), "little is learned: the curves say little"
    for name in set(learned) - {"bf16"}:
        losses = torch.tensor(learned[name].losses)
        away = (losses - truth).view(-1, 4).mean(dim=1).abs()
        print(
            f"\n{name}: {losses[0]:.3f} -> {losses[-4:].mean():.3f}, bf16 {truth[-4:].mean():.3f}, "
            f"at most {away.max():.2g} away"
        )
        assert 0 < away.max() < FP8_CURVE, (name, away)


def test_biases_and_norms_of_heads_beside_fp8_matrices() -> None:
    """With what families differ by (own head width, q/k norms, biases, a tied head), as close to bf16 as without."""
    of_families = {name: replace(setting, family="all") for name, setting in (("bf16", BF16), ("fp8", FP8))}
    [found] = run_world(1, learn, of_families, 8)
    assert (found["bf16"].matrices, found["fp8"].matrices) == (0, 16)
    away = max(abs(a - b) for a, b in zip(found["fp8"].losses, found["bf16"].losses))
    assert 0 < away < FP8_LAYOUT_LOSS and found["fp8"].losses[-1] < found["fp8"].losses[0] - 0.1


def test_divergence_check_measures_and_limits_the_gap(learned: dict[str, Learned]) -> None:
    assert learned["bf16"].gaps == (0.0, 0.0) and not learned["bf16"].refused
    for name in set(learned) - {"bf16"}:
        loss, norm = learned[name].gaps
        assert 0 < loss < 0.02 and 0 < norm < 0.2, (name, loss, norm)
        refused = learned[name].refused
        assert (
            refused.startswith("before step 1: FP8 (tensorwise): loss is ")
            and "more than precision.guard_loss_gap 1e-09" in refused
        )
        assert (
            "gradient norm" not in refused
            and "or with precision.fp8 none, and checkpoint.accept_changes true" in refused
        )


def test_tensor_parallel_matches_single_rank(learned: dict[str, Learned]) -> None:
    """Train with TP 2, where each rank scales its shard of a weight: other numbers, at the same distance from bf16."""
    first, second = run_world(2, learn, TENSOR, 8)
    for name, one in first.items():
        assert one.losses == second[name].losses and one.gaps == second[name].gaps
        alone = learned[name.split(",")[0]].losses[:8]
        assert max(abs(a - b) for a, b in zip(one.losses, alone)) < FP8_LAYOUT_LOSS, name
    assert first["fp8"].losses != first["bf16"].losses and first["fp8"].matrices == 16
