"""Whether all ranks started the same thing: one node with another checkout, package or file would train something else, or hang, without a word."""

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


def check_same_start(config: RunConfig) -> None:
    """Raises ConfigError, on all ranks, that names the ranks whose code, versions or configuration are not those of the most. Collective."""
    described = describe_start(config)
    digest = hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    told = gather_objects((socket.gethostname(), described))
    raise ConfigError(
        f"not all ranks started the same: {'; '.join(different(told))}. Start the same command from the same checkout and environment on every node"
    )


def describe_start(config: RunConfig) -> dict[str, str]:
    """Everything that must be equal, by name."""
    versions = {"python": platform.python_version(), **library_versions()}
    return {
        "code": code_hash(Path(megatron_share4v.__file__).parent),
        **versions,
        **{key: str(value) for key, value in flat(config).items()},
    }


def code_hash(package: Path) -> str:
    """SHA-256 of all Python files below `package`, in short."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def different(told: list[tuple[str, dict[str, str]]]) -> list[str]:
    """For each thing that is not equal: who has another one than most. told: (host, description) by rank."""
    found = []
    for name in dict.fromkeys(name for _, described in told for name in described):
        values = [described.get(name, "nothing") for _, described in told]
        [(usual, count), *others] = Counter(values).most_common()
        for value, _ in others:
            ranks = [rank for rank, own in enumerate(values) if own == value]
            who = ", ".join(f"{rank} ({told[rank][0]})" for rank in ranks[:SHOWN]) + (
                f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
            )
            found.append(f"{name} is {value} on rank {who}, {usual} on {count} {'others' if count > 1 else 'other'}")
    return found
