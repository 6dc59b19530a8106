"""What a run decided at its start, written beside it, and a warning where that is not what it was at the start before.

image_backend.json: which decoder is used and how it measured against the reference, in pixels and in what the run's tower sees. ops.json: which
implementation of the fused ops. attention.json: which attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_share4v.data.images.decoder import backend_version
from megatron_share4v.data.images.parity import Features, check_backend_parity
from megatron_share4v.files import atomic_write_json
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.backends import AttentionBackend
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.observability.records import read_object
from megatron_share4v.ops.backend import OpsBackend
from megatron_share4v.parallel.broadcast import broadcast_tensors
from megatron_share4v.train.data_feed import Source

FILE = "image_backend.json"
OPS_FILE = "ops.json"
ATTENTION_FILE = "attention.json"


def record_backend(source: Source, chunk: Share4V, *, mesh: Mesh, directory: Path) -> None:
    """Let the backend pass the gate on the ranks that decode, say so, and write it down. A change since the run's last start is said too.

    `chunk` is this rank's first one, with its weights. Raises OpsError when the backend is not installed or too far from the reference.
    """
    if not mesh.is_first_stage:
        return
    options = source.options
    result = check_backend_parity(
        options.image_backend,
        source.encoder.images,
        source.index,
        device_index=options.device_index,
        features=_tower(chunk, mesh),
    )
    on = "cpu" if options.device_index is None else "gpu"
    record = {"backend": options.image_backend, "on": on, "library": backend_version(options.image_backend)}
    get_logger().info("images: %s on %s (%s)", *record.values())
    if result is not None:
        get_logger().info(str(result))
        record["gate"] = asdict(result)
    if mesh.rank == 0:
        said = "images are decoded in another way than before in this run, so its pixels differ"
        _write(record, directory / FILE, names=("backend", "on", "library"), said=said)


def _tower(chunk: Share4V, mesh: Mesh) -> Features:
    """What the run's vision tower makes of images. All ranks of a sample group run it on what the first of them has decoded."""
    device = mesh.device.torch_device

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        shared = broadcast_tensors(
            [pixels] if mesh.reads_data else None,
            count=1,
            source=mesh.tp_cp_source_rank,
            group=mesh.tp_cp_group,
            device=device,
        )
        [images] = shared
        seen = [chunk.vision(image.unsqueeze(0)).flatten() for image in images]
        return torch.stack(seen) if seen else torch.empty(0, 1)

    return features


def record_ops(choice: OpsBackend, *, mesh: Mesh, directory: Path) -> None:
    """Write down what mcore/backends.py decided (and said). A change since the run's last start is said too."""
    if mesh.rank == 0:
        record = {
            "ops": choice.implementation,
            "on": mesh.device.kind,
            "reason": choice.reason,
            "library": str(choice.library or ""),
        }
        said = "the fused ops are others than before in this run, so its sums are rounded otherwise"
        _write(record, directory / OPS_FILE, names=("ops", "on"), said=said)


def record_attention(choice: AttentionBackend, *, mesh: Mesh, directory: Path) -> None:
    """The same for the attention kernel."""
    get_logger().info(choice.line)
    if mesh.rank == 0:
        record = {"attention": choice.implementation, "on": mesh.device.kind, "reason": choice.reason}
        said = "the attention kernel is another than before in this run, so its sums are rounded otherwise"
        _write(record, directory / ATTENTION_FILE, names=("attention", "on"), said=said)


def _write(record: dict[str, object], path: Path, *, names: Sequence[str], said: str) -> None:
    if before := read_object(path):
        changes = [
            f"{name} was {before.get(name)}, is {record[name]}" for name in names if before.get(name) != record[name]
        ]
        if changes:
            get_logger().warning("%s: %s", said, "; ".join(changes))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, record)
