"""Data-parallel inference: as many model replicas as the world holds, over `tensor` ranks each."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_share4v.checkpoint.hf.auto_import import is_hf_model
from megatron_share4v.checkpoint.manifest import MANIFEST
from megatron_share4v.checkpoint.store import resolve_checkpoint
from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.infer.answer_log import DPGroup
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.session import Session
from megatron_share4v.infer.tp_executor import IDLE_TIMEOUT, run_follower
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout

TIMEOUT_S = 1800
"""Timeout of collectives while the model is loaded."""


@dataclass(frozen=True)
class Replica:
    """Model replica as seen by its TP rank 0.

    share: its position among the replicas. path: the resolved checkpoint or export. dtype: of the computation.
    """

    session: Session
    engine: Engine
    share: DPGroup
    path: Path
    fingerprint: str
    dtype: str

    @property
    def name(self) -> str:
        """Identifies model and dtype in answer logs, so that answers of different models never mix."""
        return f"{self.fingerprint} {self.dtype}"


@contextlib.contextmanager
def open_replica(
    model: Path, *, tensor: int, max_requests: int, dtype: str | None, world: World
) -> Iterator[Replica | None]:
    """Open this rank's replica; yields None, after the job has ended, on TP ranks other than 0.

    Raises CheckpointError, ConversionError, DataError as Session.open does, and ConfigError when `tensor` does not
    divide the world.
    """
    # Resolved once: a run that is still training may write newer checkpoints.
    path = model if is_hf_model(model) else resolve_checkpoint(model)
    layout = Layout.for_world(ParallelConfig(tensor=tensor), world_size=world.size)
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    with (
        process_group(world, device, timeout_s=TIMEOUT_S),
        open_mesh(layout, device=device, timeout_s=TIMEOUT_S) as mesh,
    ):
        share = _dp_group(mesh)
        session = Session.open(path, mesh=mesh, dtype=dtype)
        engine = Engine.open(session, EngineConfig(max_requests=max_requests))
        if not engine.executor.is_leader:
            run_follower(engine.executor)
            yield None
            return
        get_logger().info("answering on %s, %s", device.describe(), layout)
        yield Replica(session, engine, share, path, model_fingerprint(path), dtype or session.config.precision.dtype)
        engine.close()


def model_fingerprint(path: Path) -> str:
    """Hash of a checkpoint's manifest, or of an export's config.json and its file names and sizes."""
    if not is_hf_model(path):
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.iterdir()):
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _dp_group(mesh: Mesh) -> DPGroup:
    """DP group of the TP rank 0 processes; its barrier has no time limit."""
    if mesh.layout.data == 1:
        return DPGroup()
    leaders = [rank for rank in range(mesh.layout.world_size) if mesh.layout.coordinates(rank).tensor == 0]
    group = dist.new_group(leaders, backend="gloo", timeout=IDLE_TIMEOUT)
    return DPGroup(rank=mesh.coordinates.data, size=mesh.layout.data, barrier=lambda: dist.barrier(group))
