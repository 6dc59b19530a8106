"""Consistency of code, package versions and configuration across ranks.

A node with another checkout, package or file would silently train something else, or hang.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections import Counter
from pathlib import Path

import megatron_share4v
from megatron_share4v.checkpoint.manifest import library_versions
from megatron_share4v.config.load import flat
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.parallel.collectives import gather_objects

SHOWN = 5


def check_ranks_consistent(config: RunConfig) -> None:
    """Raise ConfigError on all ranks when code, versions or configuration differ between ranks. Collective.

    The message names the ranks that differ from the majority.
    """
    description = describe_start(config)
    digest = hashlib.sha256(repr(sorted(description.items())).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    differences = find_differences(gather_objects((socket.gethostname(), description)))
    raise ConfigError(
        f"not all ranks started the same: {'; '.join(differences)}. "
        "Start the same command from the same checkout and environment on every node"
    )


def describe_start(config: RunConfig) -> dict[str, str]:
    """Return what must be equal on all ranks, by name: code hash, versions, every configuration key."""
    versions = {"python": platform.python_version(), **library_versions()}
    return {
        "code": code_hash(Path(megatron_share4v.__file__).parent),
        **versions,
        **{key: str(value) for key, value in flat(config).items()},
    }


def code_hash(package: Path) -> str:
    """Return a short SHA-256 of all Python files below `package`."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def find_differences(descriptions: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Describe each value that differs from the majority, with its ranks. descriptions: (host, values) by rank."""
    found = []
    for name in dict.fromkeys(name for _, values in descriptions for name in values):
        by_rank = [values.get(name, "nothing") for _, values in descriptions]
        [(usual, count), *others] = Counter(by_rank).most_common()
        for value, _ in others:
            ranks = [rank for rank, own in enumerate(by_rank) if own == value]
            who = ", ".join(f"{rank} ({descriptions[rank][0]})" for rank in ranks[:SHOWN])
            who += f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
            found.append(f"{name} is {value} on rank {who}, {usual} on {count} {'others' if count > 1 else 'other'}")
    return found
