"""Logging for many ranks: every rank writes its own file, rank 0 alone speaks on the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

NAME = "megatron_share4v"


class _File(logging.FileHandler):
    """A log on a disk that is full says so once; it neither ends the program nor fills the screen with tracebacks."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """What logging calls inside the except block of a record that could not be written."""
        if not self.told:
            self.told = True
            print(
                f"{self.baseFilename}: some lines could not be written: {sys.exc_info()[1]}",
                file=sys.stderr,
                flush=True,
            )


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
        file = _File(directory / f"rank{rank}.txt")
        file.setFormatter(formatter)
        logger.addHandler(file)
    return logger
