"""FusedAdamW inside Megatron's distributed optimizer on two DP ranks: steps, clipping, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_world
from tolerances import LAYOUT_LOSS, LAYOUT_WEIGHT


def swap(run: object) -> None:
    """Replace core's torch optimizer by FusedAdamW."""
    from megatron_share4v.mcore.optimizer import chained_optimizers
    from megatron_share4v.ops.adamw_optimizer import FusedAdamW

    for part in chained_optimizers(run.optimizer):
        part.optimizer = FusedAdamW.in_place_of(part.optimizer, implementation="native")


def four_steps(folder: str) -> dict[str, object]:
    """Run torch's optimizer only; FusedAdamW from step 1 on; the same, saved after step 3 and resumed elsewhere."""
    import torch.distributed as dist
    from small_run import Run, Setting

    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.ops.backend import choose_ops_backend
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    choose_ops_backend("native", device="cpu")
    layout = Layout.for_world(ParallelConfig(distributed_optimizer=True), world_size=dist.get_world_size())
    with open_mesh(layout, device=Device("cpu")) as mesh:
        plain, fused, resumed = (Run(mesh, Setting(language_layers=2), seed=seed) for seed in (1, 1, 2))
        plain_losses = plain.train(0, 4)
        losses = fused.train(0, 1)
        swap(fused)
        losses += fused.train(1, 3)
        saved = fused.save(Path(folder), 3)
        losses += fused.train(3, 4)
        swap(resumed)
        resumed.load(saved)
        again = resumed.train(3, 4)
        return {
            "losses": (plain_losses, losses),
            "weights": (plain.weights(), fused.weights(), resumed.weights()),
            "resumed": (losses[3:], again),
        }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, native_ops: None) -> list[dict]:
    return run_world(2, four_steps, str(tmp_path_factory.mktemp("checkpoints")))


def test_training_equals_torchs_optimizer(ranks: list[dict]) -> None:
    for rank in ranks:
        plain, fused = rank["losses"]
        assert plain[0] != plain[3]
        for (a, _), (b, _) in zip(plain, fused, strict=True):
            assert abs(a - b) <= LAYOUT_LOSS
        for a, b in zip(*rank["weights"][:2], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=LAYOUT_WEIGHT)


def test_checkpoint_resume_is_bitwise_exact(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["resumed"][0] == rank["resumed"][1]
        assert all(torch.equal(a, b) for a, b in zip(*rank["weights"][1:], strict=True))
