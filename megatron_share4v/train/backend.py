"""image_backend.json: which decoder a run uses and how it measured against the reference at start."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_share4v.data.decoder import library
from megatron_share4v.data.gate import pass_gate
from megatron_share4v.log import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.train.feed import Source

FILE = "image_backend.json"


def record_backend(source: Source, *, mesh: Mesh, directory: Path) -> None:
    """Let the backend pass the gate on the ranks that decode, say so, and write it down. A change since the run's last start is said too.

    Raises OpsError when the backend is not installed or too far from the reference.
    """
    if not mesh.holds_first_stage:
        return
    options = source.options
    result = pass_gate(options.image_backend, source.encoder.images, source.index, device_index=options.device_index)
    on = "cpu" if options.device_index is None else "gpu"
    record = {"backend": options.image_backend, "on": on, "library": library(options.image_backend)}
    get_logger().info("images: %s on %s (%s)", *record.values())
    if result is not None:
        get_logger().info(str(result))
        record["gate"] = asdict(result)
    if mesh.rank == 0:
        _write(record, directory / FILE)


def _write(record: dict[str, object], path: Path) -> None:
    names = ("backend", "on", "library")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changes = [f"{name} was {before.get(name)}, is {record[name]}" for name in names if before.get(name) != record[name]]
        if changes:
            get_logger().warning("images are decoded in another way than before in this run, so its pixels differ: %s", "; ".join(changes))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
