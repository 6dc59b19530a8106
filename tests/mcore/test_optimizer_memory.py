"""Optimizer memory on two DP ranks: bf16 moments, bf16 gradients, moments on the host, nothing for frozen parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from harness import run_world
from small_run import Setting
from tolerances import BF16_LOSS

SETTINGS = {
    "plain": Setting(language_layers=2),
    "moments": Setting(language_layers=2, moments="bf16"),
    "moments, unsharded": Setting(language_layers=2, moments="bf16", distributed_optimizer=False),
    "moments, native": Setting(language_layers=2, moments="bf16", ops="native"),
    "offload": Setting(language_layers=2, offload=True),
    "bf16": Setting(language_layers=2, dtype="bf16"),
    "gradients": Setting(language_layers=2, dtype="bf16", gradients="bf16"),
    "gradients and moments": Setting(language_layers=2, dtype="bf16", gradients="bf16", moments="bf16"),
    "projector": Setting(language_layers=2, trainable="projector"),
}


@dataclass(frozen=True)
class Kept:
    """Results of one rank."""

    losses: list[float]
    again: list[float]
    """The last two losses again, after a resume from the checkpoint before them."""
    elsewhere: list[float]
    """The same with fp32 moments."""
    gradient_bytes: int
    moment_bytes: int
    trained: int
    buffered: int
    frozen_gradients: int


def trained_and_counted(folder: str, names: list[str]) -> dict[str, Kept]:
    """Train four steps and save after two; the last loss depends on the moments."""
    import torch.distributed as dist
    from small_run import Run

    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.mcore.optimizer import chained_optimizers
    from megatron_share4v.ops.backend import choose_ops_backend
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    results = {}
    with open_mesh(Layout(data=dist.get_world_size()), device=Device("cpu")) as mesh:
        for name in names:
            if SETTINGS[name].ops == "native":
                choose_ops_backend("native", device="cpu")
            run, again, plain = (Run(mesh, setting, seed=seed) for setting, seed in _three(SETTINGS[name]))
            losses = run.train(0, 2)
            saved = run.save(Path(folder) / name.replace(", ", "-"), 2)
            losses += run.train(2, 4)
            again.load(saved)
            plain.load(saved)
            [chunk] = run.chunks
            states = [state for part in chained_optimizers(run.optimizer) for state in part.optimizer.state.values()]
            parameters = list(run.bare[0].parameters())
            results[name] = Kept(
                losses=[loss for loss, _ in losses],
                again=[loss for loss, _ in again.train(2, 4)],
                elsewhere=[loss for loss, _ in plain.train(2, 4)],
                gradient_bytes=sum(buffer.grad_data.nbytes for buffer in chunk.buffers),
                moment_bytes=sum(state[average].nbytes for state in states for average in ("exp_avg", "exp_avg_sq")),
                trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
                buffered=sum(buffer.numel_unpadded for buffer in chunk.buffers),
                frozen_gradients=sum(
                    hasattr(p, "main_grad") or p.grad is not None for p in parameters if not p.requires_grad
                ),
            )
    return results


def _three(setting: Setting) -> list[tuple[Setting, int]]:
    return [(setting, 1), (setting, 2), (replace(setting, moments="fp32"), 3)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Kept]]:
    names = [name for name in SETTINGS if "native" not in name]
    return run_world(2, trained_and_counted, str(tmp_path_factory.mktemp("checkpoints")), names)


def test_bytes(kept: list[dict[str, Kept]]) -> None:
    for rank in kept:
        plain = rank["plain"]
        # Half of all weights on each of two ranks, two moments of 4 bytes; the halves differ by the padding of buckets.
        assert plain.moment_bytes == pytest.approx(2 * 4 * plain.trained / 2, rel=0.01)
        assert rank["moments"].moment_bytes * 2 == plain.moment_bytes == rank["offload"].moment_bytes
        assert rank["moments, unsharded"].moment_bytes == 2 * 2 * plain.trained
        assert rank["gradients"].gradient_bytes * 2 == rank["bf16"].gradient_bytes
        assert rank["bf16"].gradient_bytes == pytest.approx(4 * plain.trained, rel=0.02)


def test_frozen_parts_have_no_gradients(kept: list[dict[str, Kept]]) -> None:
    for rank in kept:
        assert all(one.frozen_gradients == 0 for one in rank.values())
        # Buffers align each weight to a multiple of 64.
        assert rank["plain"].trained <= rank["plain"].buffered < 1.05 * rank["plain"].trained
        assert rank["projector"].buffered < 1.1 * rank["projector"].trained < rank["plain"].trained / 5


def test_training_is_about_the_same(kept: list[dict[str, Kept]]) -> None:
    for rank in kept:
        assert rank["offload"].losses == pytest.approx(rank["plain"].losses, abs=2e-6)
        for name, other in (
            ("moments", "plain"),
            ("moments, unsharded", "plain"),
            ("gradients", "bf16"),
            ("gradients and moments", "bf16"),
        ):
            assert rank[name].losses != rank[other].losses
            assert rank[name].losses == pytest.approx(rank[other].losses, abs=BF16_LOSS), name


def test_resume_is_bitwise_exact_and_works_with_other_moments(kept: list[dict[str, Kept]]) -> None:
    for rank in kept:
        for name, one in rank.items():
            assert one.again == one.losses[2:], name
            assert one.elsewhere == pytest.approx(one.losses[2:], abs=1e-4), name


def test_native_updates_too(tmp_path: Path, native_ops: None) -> None:
    for rank in run_world(2, trained_and_counted, str(tmp_path), ["moments, native", "moments"]):
        assert rank["moments, native"].losses == pytest.approx(rank["moments"].losses, abs=1e-4)
        assert rank["moments, native"].again == rank["moments, native"].losses[2:]


def test_offload_moves_one_parameter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_share4v.ops import adamw_optimizer as module
    from megatron_share4v.ops.adamw_optimizer import FusedAdamW

    calls = []
    monkeypatch.setattr(module, "adamw_", lambda weights, **_: calls.append(len(weights)))
    for on_host in (False, True):
        weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
        for weight in weights:
            weight.grad = torch.ones(3)
        FusedAdamW(weights, on_host=on_host, implementation="reference").step()
    assert calls == [4, 1, 1, 1, 1]
