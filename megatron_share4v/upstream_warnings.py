"""Warnings of megatron-core and torch that no user can act on: written to the log files, hidden on the console.

Python warnings and the loggers of megatron-core are routed through logging. Any warning that is not listed here still
reaches the console.
"""

from __future__ import annotations

import logging
import logging.handlers
import re
from dataclasses import dataclass

LOGGERS = ("py.warnings", "megatron")
"""The logger of logging.captureWarnings, and the parent of megatron-core's loggers."""


@dataclass(frozen=True)
class KnownWarning:
    """A warning to hide: regular expressions for its message and for the source file that issues it, and the reason."""

    message: str
    source: str
    reason: str
    cpu_only: bool = False
    """Hide it only without CUDA; on a GPU a user can act on it."""


KNOWN = (
    KnownWarning(
        message="full scope is deprecated. Use empty cuda_graph_scope",
        source=r"transformer_config\.py",
        reason="megatron-core replaces its own default value; no CUDA graph is used here",
    ),
    KnownWarning(
        message=r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        source="megatron/core/optimizer",
        reason="the optimizer looks for gradients of views of parameters, which have none",
    ),
    KnownWarning(
        message="Apex is not installed. Falling back to Torch Norm",
        source=r"models/backends\.py",
        reason="this project chooses the norm itself (mcore/layer_specs.py)",
    ),
    KnownWarning(
        message="Transformer Engine and Apex are not installed",
        source="megatron/core",
        reason="the optimizer and the layers in use are logged at start",
    ),
    KnownWarning(
        message="environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        source=r"tensor_parallel/layers\.py",
        reason="there are no CUDA streams on the CPU",
        cpu_only=True,
    ),
    KnownWarning(
        message=r"torch\.distributed.* is deprecated",
        source="torch/distributed",
        reason="megatron-core calls the old names of collectives",
    ),
    KnownWarning(
        message="`load_state_dict` is deprecated",
        source="dist_checkpointing",
        reason="megatron-core calls the old name of torch.distributed.checkpoint.load",
    ),
    KnownWarning(
        message="Unknown MLP type",
        source="megatron/core",
        reason="issued for every MLP class but megatron-core's own; this project's takes the same arguments",
    ),
)


class _HideKnown(logging.Filter):
    """Rejects the records of known warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.cuda = False

    def filter(self, record: logging.LogRecord) -> bool:
        # A captured Python warning names its source file in the text, a log record in its own field.
        text = record.getMessage()
        source = text if record.name == "py.warnings" else record.pathname
        return not any(
            re.search(known.message, text) and re.search(known.source, source) and not (known.cpu_only and self.cuda)
            for known in KNOWN
        )


hide_known = _HideKnown()
_early_records = logging.handlers.MemoryHandler(capacity=0, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


def route_warnings(*, cuda: bool) -> None:
    """Route upstream warnings through logging, before the first import of megatron.core.

    Until `attach_handlers` is called, unknown warnings go to stderr and all are kept in memory for the log file.
    """
    hide_known.cuda = cuda
    logging.captureWarnings(True)
    for logger in map(logging.getLogger, LOGGERS):
        logger.propagate = False
        if not logger.handlers:
            console = logging.StreamHandler()
            console.addFilter(hide_known)
            logger.addHandler(console)
            logger.addHandler(_early_records)


def attach_handlers(*, console: logging.Handler | None, file: logging.Handler | None) -> None:
    """Send upstream warnings to `file`, and all but the known ones to `console`."""
    logging.captureWarnings(True)
    if console is not None:
        console.addFilter(hide_known)
    for logger in map(logging.getLogger, LOGGERS):
        logger.propagate = False
        logger.handlers = [handler for handler in (console, file) if handler is not None] or [logging.NullHandler()]
    if file is not None:
        _early_records.setTarget(file)
        _early_records.flush()
    _early_records.setTarget(None)
    _early_records.buffer.clear()
