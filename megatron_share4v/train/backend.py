"""image_backend.json: which decoder a run uses and how it measured against the reference at start, in pixels and in what the run's tower sees."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_share4v.data.decoder import library
from megatron_share4v.data.gate import Features, pass_gate
from megatron_share4v.log import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.parallel.broadcast import broadcast_tensors
from megatron_share4v.train.feed import Source

FILE = "image_backend.json"


def record_backend(source: Source, chunk: Share4V, *, mesh: Mesh, directory: Path) -> None:
    """`chunk`: this rank's first one, with its weights. Let the backend pass the gate on the ranks that decode, say so, and write it down. A change since the run's last start is said too.

    Raises OpsError when the backend is not installed or too far from the reference.
    """
    if not mesh.holds_first_stage:
        return
    options = source.options
    result = pass_gate(options.image_backend, source.encoder.images, source.index, device_index=options.device_index, features=_tower(chunk, mesh))
    on = "cpu" if options.device_index is None else "gpu"
    record = {"backend": options.image_backend, "on": on, "library": library(options.image_backend)}
    get_logger().info("images: %s on %s (%s)", *record.values())
    if result is not None:
        get_logger().info(str(result))
        record["gate"] = asdict(result)
    if mesh.rank == 0:
        _write(record, directory / FILE)


def _tower(chunk: Share4V, mesh: Mesh) -> Features:
    """What the run's vision tower makes of images. All ranks of a tensor group run it on what the first of them has decoded."""
    device = mesh.device.torch_device

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        shared = broadcast_tensors([pixels] if mesh.reads_data else None, count=1, source=mesh.tensor_source, group=mesh.tensor_group, device=device)
        [images] = shared
        seen = [chunk.vision(image.unsqueeze(0).to(chunk.config.params_dtype)).flatten() for image in images]
        return torch.stack(seen) if seen else torch.empty(0, 1)

    return features


def _write(record: dict[str, object], path: Path) -> None:
    names = ("backend", "on", "library")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changes = [f"{name} was {before.get(name)}, is {record[name]}" for name in names if before.get(name) != record[name]]
        if changes:
            get_logger().warning("images are decoded in another way than before in this run, so its pixels differ: %s", "; ".join(changes))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
