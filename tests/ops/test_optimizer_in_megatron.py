"""AdamW inside Megatron's optimizers on two DP ranks: steps, clipping, resume, also beside another FusedAdam."""

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


class FusedAdam:
    """Stand-in for the FusedAdam of Transformer Engine or apex, which must not be chosen."""

    def __init__(self, *args: object, **options: object) -> None:
        raise AssertionError("core chose FusedAdam")


def resume_beside_fused_adam(folder: str, distributed_optimizer: bool) -> dict[str, object]:
    """Train four steps, save after step 3 and resume, with megatron-core set as where it has found such a FusedAdam."""
    from unittest.mock import patch

    import megatron.core.optimizer as core
    import torch.distributed as dist
    from megatron.core.optimizer import distrib_optimizer
    from small_run import Run, Setting

    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.mcore.optimizer import chained_optimizers, step_counts
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    parallel = ParallelConfig(distributed_optimizer=distributed_optimizer)
    layout = Layout.for_world(parallel, world_size=dist.get_world_size())
    with (
        patch.multiple(core, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
        open_mesh(layout, device=Device("cpu")) as mesh,
    ):
        run, resumed = (Run(mesh, Setting(language_layers=2), seed=seed) for seed in (1, 2))
        run.train(0, 3)
        resumed.load(run.save(Path(folder), 3))
        counts = set(step_counts(resumed.optimizer))
        losses = (run.train(3, 4), resumed.train(3, 4))
        kinds = {type(part.optimizer) for part in chained_optimizers(run.optimizer)}
        return {"losses": losses, "weights": (run.weights(), resumed.weights()), "counts": counts, "kinds": kinds}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_resume_where_fused_adam_is_installed(tmp_path: Path, distributed_optimizer: bool) -> None:
    for rank in run_world(2, resume_beside_fused_adam, str(tmp_path), distributed_optimizer):
        assert rank["kinds"] == {torch.optim.AdamW}
        assert rank["counts"] == {3}
        assert rank["losses"][0] == rank["losses"][1]
        assert all(torch.equal(a, b) for a, b in zip(*rank["weights"], strict=True))
