"""Start the server from a checkpoint: rank 0 listens and answers, the other TP ranks follow its engine."""

from __future__ import annotations

import signal
from pathlib import Path

import torch

from megatron_share4v.checkpoint.hf.auto_import import is_hf_model
from megatron_share4v.checkpoint.manifest import read_manifest
from megatron_share4v.checkpoint.store import resolve_checkpoint
from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.session import Session
from megatron_share4v.infer.tp_executor import run_follower
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.serve.engine_thread import ServedModel
from megatron_share4v.serve.server import serve


def serve_checkpoint(
    checkpoint: Path, world: World, *, config: ServeConfig, engine: EngineConfig, dtype: str | None = None
) -> None:
    """Serve until a signal. All ranks of `world` form one TP group, whatever layout the model was trained at.

    Raises ConfigError, CheckpointError, ConversionError or DataError for what cannot be served, and whatever the engine
    raises.
    """
    if not is_hf_model(checkpoint):
        read_manifest(resolve_checkpoint(checkpoint))  # before anything is started
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    with process_group(world, device, timeout_s=600), open_mesh(Layout(tensor=world.size), device=device) as mesh:
        if world.rank == 0:
            serve(config, lambda: _load(checkpoint, mesh, engine, dtype))
            return
        # The launcher signals every rank; rank 0 finishes its answers and then releases the others.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        run_follower(Engine.open(Session.open(checkpoint, mesh=mesh, dtype=dtype), engine).executor)


def _load(checkpoint: Path, mesh: Mesh, config: EngineConfig, dtype: str | None) -> ServedModel:
    """Load the model in the engine's thread: the current CUDA device is per thread."""
    if mesh.device.kind == "cuda":
        torch.cuda.set_device(mesh.device.index)
    session = Session.open(checkpoint, mesh=mesh, dtype=dtype)
    engine = Engine.open(session, config)
    return ServedModel(
        engine=engine,
        encoder=session.encoder,
        tokens_per_image=session.config.model.vision.num_features,
        close=engine.close,
    )
