"""Weights & Biases writer (log.wandb): the scalars that TensorBoard gets, and the configuration.

The environment variables of wandb apply; WANDB_MODE=offline keeps the data on this machine.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from megatron_share4v.config.load import flat
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import OpsError
from megatron_share4v.files import atomic_write_json
from megatron_share4v.observability.records import read_object

FILE = "wandb.json"


def check_wandb(config: RunConfig) -> None:
    """Raise OpsError when log.wandb is set and the package is not installed."""
    if config.log.wandb is not None and find_spec("wandb") is None:
        raise OpsError(
            f"log.wandb is {config.log.wandb!r} and the package wandb is not installed; pip install wandb, or set "
            "log.wandb null"
        )


class WandbWriter:
    """Writes the scalars of a run; a resumed run continues under the id kept in the run directory."""

    def __init__(self, config: RunConfig) -> None:
        """Start or resume the wandb run. Raises OpsError when wandb refuses it (no login, no network)."""
        import wandb

        directory = Path(config.run.directory)
        path = directory / FILE
        identity = read_object(path).get("id")
        if identity is None:
            identity = uuid.uuid4().hex[:12]
            atomic_write_json(path, {"id": identity})
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                name=directory.name,
                id=identity,
                resume="allow",
                dir=str(directory),
                config=flat(config),
            )
        except Exception as problem:
            raise OpsError(
                f"log.wandb: wandb cannot start a run: {problem}; wandb login, or WANDB_MODE=offline, or log.wandb null"
            ) from problem

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Write the scalars of one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and end the wandb run."""
        self._run.finish()
