"""Small run for tests: the tiny model at some layout, trained, saved and loaded."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tiny import GLOBAL_BATCH, MICRO_BATCH, micro_batches, step_items, tiny_family

MICRO_BATCHES = 4
TRAINABLE = {"half_tower": {"vision_from_block": 1}, "projector": {"language": False, "projector": True}}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Training settings of the tiny model."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    sequence: bool = False
    distributed_optimizer: bool = True
    dtype: str = "fp32"
    trainable: str = "half_tower"
    learning_rate: float = 1e-3
    language_layers: int = 4
    language_width: int = 48
    moments: str = "fp32"
    gradients: str = "fp32"
    offload: bool = False
    ops: str = "reference"
    fp8: tuple[tuple[str, object], ...] = ()
    """FP8 fields of PrecisionConfig, as (name, value)."""
    language_hidden: int = 32
    family: str = "plain"

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.tensor, self.pipeline, self.virtual


@contextmanager
def opened(setting: Setting):
    """Open the mesh of a setting over all ranks of this world."""
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    tensor, pipeline, virtual = setting.degrees
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        data=torch.distributed.get_world_size() // (tensor * pipeline),
    )
    with open_mesh(layout, device=Device("cpu")) as mesh:
        yield mesh


class Run:
    """A new model and optimizer on a mesh."""

    def __init__(self, mesh, setting: Setting, *, seed: int) -> None:
        from megatron_share4v.config.parallel import ParallelConfig
        from megatron_share4v.config.run import PrecisionConfig
        from megatron_share4v.config.training import OptimConfig, TrainConfig
        from megatron_share4v.mcore.layer_options import layer_options
        from megatron_share4v.mcore.optimizer import build_optimizer, wrap_ddp
        from megatron_share4v.model.chunks import build_chunks
        from megatron_share4v.model.initialize import initialize_weights

        self.mesh, self.setting = mesh, setting
        names = ("tensor", "pipeline", "virtual", "sequence", "distributed_optimizer")
        parallel = ParallelConfig(**{name: getattr(setting, name) for name in names})
        model = tiny_family(setting.family, **TRAINABLE[setting.trainable])
        language = replace(model.language, num_layers=setting.language_layers, intermediate_size=setting.language_width)
        language = replace(language, hidden_size=setting.language_hidden)
        self.model = replace(model, language=language)
        self.precision = PrecisionConfig(dtype=setting.dtype, gradients=setting.gradients, **dict(setting.fp8))
        options = layer_options(TrainConfig(global_batch_size=1), precision=self.precision)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.dtype]
        self.bare = build_chunks(
            self.model, mesh=mesh, parallel=parallel, dtype=dtype, ops=setting.ops, options=options
        )
        initialize_weights(self.bare, seed=seed, model=self.model)
        self.chunks = wrap_ddp(self.bare, mesh=mesh, parallel=parallel, gradients=setting.gradients)
        rate = setting.learning_rate
        kept = {"moments": setting.moments, "offload": setting.offload}
        optim = OptimConfig(
            learning_rate=rate, projector_learning_rate=2 * rate, weight_decay=0.1, clip_grad_norm=1.0, **kept
        )
        self.optimizer = build_optimizer(self.chunks, optim, parallel=parallel, dtype=dtype)

    def train(self, first: int, last: int) -> list[tuple[float, float]]:
        """Train the steps with 0-based index first to last - 1; return loss and gradient norm of each."""
        from megatron_share4v.train.data_feed import StepData
        from megatron_share4v.train.step import StepSettings, train_step

        settings = StepSettings(mesh=self.mesh, micro_batch_size=MICRO_BATCH, clip_grad_norm=1.0)
        results = []
        for step in range(first, last):
            mine = micro_batches(step)[:MICRO_BATCHES][self.mesh.coordinates.data :: self.mesh.layout.data]
            data = StepData(step_items(step), mine, 0.0)
            result = train_step(self.chunks, self.optimizer, data, settings=settings, learning_rate_factor=1.0)
            results.append((result.loss, result.grad_norm))
        return results

    def save(self, directory: Path, step: int) -> Path:
        """Save a checkpoint with optimizer state and return its path."""
        from megatron_share4v.checkpoint.store import CheckpointContents, RunState, save_checkpoint

        state = RunState(step=step, consumed_samples=step * GLOBAL_BATCH, plan_fingerprint="plan")
        contents = CheckpointContents(
            chunks=self.chunks, optimizer=self.optimizer, mesh=self.mesh, state=state, config_text="run: {}\n"
        )
        return save_checkpoint(directory, contents)

    def load(self, path: Path, **options):
        """Load the checkpoint at `path`."""
        from megatron_share4v.checkpoint.store import load_checkpoint

        return load_checkpoint(path, chunks=self.chunks, optimizer=self.optimizer, **options)

    def weights(self) -> list[torch.Tensor]:
        """Return copies of the weights on this rank."""
        return [parameter.detach().clone() for chunk in self.bare for parameter in chunk.parameters()]


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all global tensors of a checkpoint, weights and optimizer state, in this process."""
    from torch.distributed import checkpoint as torch_checkpoint

    reader = torch_checkpoint.FileSystemReader(checkpoint)
    described = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
