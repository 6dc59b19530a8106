"""Logging for many ranks: every rank writes its own file; rank 0 logs to the console, other ranks only their errors."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megatron_share4v.upstream_warnings import attach_handlers

NAME = "megatron_share4v"


class _LogFile(logging.FileHandler):
    """A log file that reports a write failure once: a full disk neither ends the program nor floods the console."""

    failure_reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first write failure on stderr; logging calls this inside the except block."""
        if not self.failure_reported:
            self.failure_reported = True
            message = f"{self.baseFilename}: some lines could not be written: {sys.exc_info()[1]}"
            print(message, file=sys.stderr, flush=True)


def get_logger() -> logging.Logger:
    """Return the package's logger, which is silent until `configure` is called."""
    return logging.getLogger(NAME)


def configure(*, rank: int, directory: Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Log to stderr and, with `directory`, to `directory/rank<N>.txt`; return the package's logger.

    On the console rank 0 shows everything, other ranks only errors, marked with their rank. Upstream warnings go to the
    file, and to the console of rank 0 unless upstream_warnings.py lists them.
    """
    logger = get_logger()
    logger.setLevel(level)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level if rank == 0 else logging.ERROR)
    origin = f"[rank {rank}] " if rank else ""
    console.setFormatter(logging.Formatter(f"%(asctime)s {origin}%(message)s", "%H:%M:%S"))
    logger.addHandler(console)
    file = None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        file = _LogFile(directory / f"rank{rank}.txt")
        file.setFormatter(logging.Formatter(f"%(asctime)s rank{rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(file)
    attach_handlers(console=console, file=file)
    return logger
