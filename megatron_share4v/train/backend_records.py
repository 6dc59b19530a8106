"""Records the backends a run has chosen in its run directory and warns when one differs from the previous start.

image_backend.json: image decoder, and its difference from the reference in pixels and vision features. ops.json:
implementation of the fused ops. attention.json: attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_share4v.data.images.decoder import backend_version
from megatron_share4v.data.images.parity import Features, check_backend_parity
from megatron_share4v.data.images.torch_decoder import FILTERS as TORCH_FILTERS
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


def record_image_backend(source: Source, chunk: Share4V, *, mesh: Mesh, directory: Path) -> None:
    """Check the image backend against the reference on the ranks that decode, then log and record it. Collective.

    `chunk` is this rank's first model chunk, with its weights. Raises OpsError when the backend is not installed or too
    far from the reference.
    """
    if not mesh.is_first_stage:
        return
    options = source.options
    result = check_backend_parity(
        options.image_backend,
        source.encoder.images,
        source.index,
        device_index=options.device_index,
        features=_vision_features(chunk, mesh),
    )
    on = "cpu" if options.device_index is None else "gpu"
    record: dict[str, object] = {
        "backend": options.image_backend,
        "on": on,
        "library": backend_version(options.image_backend),
    }
    get_logger().info("images: %s on %s (%s); %s", *record.values(), source.encoder.images)
    if options.image_backend == "torch_u8" and source.encoder.images.resample not in TORCH_FILTERS:
        get_logger().info("images: torch has no %s filter; all are left to pil", source.encoder.images.resample)
    if result is not None:
        get_logger().info(str(result))
        record["gate"] = asdict(result)
    if mesh.rank == 0:
        warning = "images are decoded in another way than before in this run, so its pixels differ"
        _write_record(record, directory / FILE, keys=("backend", "on", "library"), warning=warning)


def _vision_features(chunk: Share4V, mesh: Mesh) -> Features:
    """Return a function that runs the vision tower on the images decoded by the first rank of each sample group."""
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
        assert images is not None and chunk.vision is not None  # the first stage has pixels and the tower
        rows = [chunk.vision(image.unsqueeze(0)).flatten() for image in images]
        return torch.stack(rows) if rows else torch.empty(0, 1)

    return features


def record_ops_backend(choice: OpsBackend, *, mesh: Mesh, directory: Path) -> None:
    """Record the implementation of the fused ops on rank 0."""
    if mesh.rank == 0:
        record: dict[str, object] = {
            "ops": choice.implementation,
            "on": mesh.device.kind,
            "reason": choice.reason,
            "library": str(choice.library or ""),
        }
        warning = "the fused ops differ from those before in this run, so its sums are rounded otherwise"
        _write_record(record, directory / OPS_FILE, keys=("ops", "on"), warning=warning)


def record_attention_backend(choice: AttentionBackend, *, mesh: Mesh, directory: Path) -> None:
    """Log the attention kernel, and record it on rank 0."""
    get_logger().info(choice.line)
    if mesh.rank == 0:
        record: dict[str, object] = {
            "attention": choice.implementation,
            "on": mesh.device.kind,
            "reason": choice.reason,
        }
        warning = "the attention kernel differs from the one before in this run, so its sums are rounded otherwise"
        _write_record(record, directory / ATTENTION_FILE, keys=("attention", "on"), warning=warning)


def _write_record(record: dict[str, object], path: Path, *, keys: Sequence[str], warning: str) -> None:
    """Replace the record at `path`; log `warning` when one of `keys` has changed."""
    if before := read_object(path):
        changes = [f"{key} was {before.get(key)}, is {record[key]}" for key in keys if before.get(key) != record[key]]
        if changes:
            get_logger().warning("%s: %s", warning, "; ".join(changes))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, record)
