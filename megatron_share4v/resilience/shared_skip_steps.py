"""The quarantine list of steps (resilience/skip_steps.py) as all ranks of a run know it."""

from __future__ import annotations

from pathlib import Path

from megatron_share4v.checkpoint.store import on_first_rank
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.resilience.skip_steps import FILE, read_skips


def shared_skips(directory: Path, *, mesh: Mesh, after: int) -> dict[int, str]:
    """The list as rank 0 reads it, on all ranks. Those to come are said. Collective."""
    skips = on_first_rank(mesh, lambda: read_skips(directory))
    coming = [f"{step} ({reason})" for step, reason in sorted(skips.items()) if step > after]
    if coming:
        get_logger().warning("steps that will be passed over, listed in %s: %s", directory / FILE, "; ".join(coming))
    return skips
