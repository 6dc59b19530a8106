"""Starting a captioner of our own: the model on its ranks, and the job on top of it. Without torchrun: one process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_share4v.caption.job import JobOptions, Summary, run_job
from megatron_share4v.caption.journal import Share
from megatron_share4v.caption.local import LocalCaptioner
from megatron_share4v.caption.records import Settings
from megatron_share4v.checkpoint.foreign import is_foreign
from megatron_share4v.checkpoint.manifest import MANIFEST
from megatron_share4v.checkpoint.store import locate
from megatron_share4v.config.run import ParallelConfig
from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.ranks import IDLE, follow
from megatron_share4v.infer.session import Session
from megatron_share4v.log import get_logger
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, joined
from megatron_share4v.parallel.layout import Layout

TIMEOUT_S = 1800
"""Of collectives while the model is opened."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """name: a checkpoint, a run directory, or the directory of an export. tensor: ranks that one model is spread over. dtype None: as trained."""

    name: str
    batch_size: int = 16
    tensor: int = 1
    dtype: str | None = None
    workers: int = 4


def caption_with_model(model: ModelOptions, job: JobOptions, *, settings: Settings, world: World) -> Summary | None:
    """The captions of `job` from a model of ours, on all ranks of `world`: see run_job. Raises ConfigError, CheckpointError, DataError."""
    if world.size % model.tensor:
        raise ConfigError(
            f"--num_gpus {model.tensor} spreads one model over {model.tensor} processes, and {world.size} are running; start with "
            f"torchrun --nproc-per-node {model.tensor} tools/caption.py ..., or a multiple of it to caption with several models at once"
        )
    path = _resolved(model.name)
    layout = Layout.for_world(ParallelConfig(tensor=model.tensor), world_size=world.size)
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    with joined(world, device, timeout_s=TIMEOUT_S), open_mesh(layout, device=device, timeout_s=TIMEOUT_S) as mesh:
        share = _share(mesh)
        session = Session.open(path, mesh=mesh, dtype=model.dtype)
        engine = Engine.open(session, EngineConfig(max_requests=model.batch_size * settings.num_beams))
        if not engine.ranks.leads:
            return follow(engine)
        get_logger().info("captioning on %s, %s", device.describe(), layout)
        captioner = LocalCaptioner(session, engine, settings=settings, workers=model.workers)
        named = f"{fingerprint(path)} {model.dtype or session.config.precision.dtype}"
        summary = run_job(captioner, job, settings=settings, model=named, share=share)
        engine.close()
        return summary


def fingerprint(path: Path) -> str:
    """Of a checkpoint's manifest, which has the hashes of all its files; of another layout's config.json and the names and sizes of its files."""
    if not is_foreign(path):
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.iterdir()):
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _resolved(name: str) -> Path:
    """Now, so that a run that goes on training does not change the model between journal and weights."""
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"--model-name {name}: is no directory here; give a checkpoint, a run directory or an export of tools/convert.py. (ShareCaptioner itself "
            "has another architecture and is not read: a model of ours takes the same files and options)"
        )
    return path if is_foreign(path) else locate(path)


def _share(mesh: Mesh) -> Share:
    """The leaders of the tensor groups share the work, and wait for each other as long as it takes."""
    if mesh.layout.data == 1:
        return Share()
    leaders = [rank for rank in range(mesh.layout.world_size) if mesh.layout.coordinates(rank).tensor == 0]
    group = dist.new_group(leaders, backend="gloo", timeout=IDLE)
    return Share(rank=mesh.coordinates.data, size=mesh.layout.data, meet=lambda: dist.barrier(group))
