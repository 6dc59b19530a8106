"""Logging for many ranks: every rank writes its own file, rank 0 alone speaks on the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

NAME = "megatron_share4v"


def get_logger() -> logging.Logger:
    """The package's one logger; silent until `configure` is called."""
    return logging.getLogger(NAME)


def configure(*, rank: int, directory: Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Send records of rank 0 to stderr and those of every rank to `directory/rank<N>.txt`."""
    logger = get_logger()
    logger.setLevel(level)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter(f"%(asctime)s rank{rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    if rank == 0:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(directory / f"rank{rank}.txt")
        file.setFormatter(formatter)
        logger.addHandler(file)
    return logger
