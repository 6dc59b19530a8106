"""What would make the host wait for a GPU, noticed on the CPU: tensors that the host makes (no device is named) are told apart from all others, which
stand for the device's. A wait is: reading a value of a device's tensor, an operation whose result has a size that only values tell, a copy between
the two but by parallel.device.sent, or torch.cuda.synchronize. On a GPU, torch.cuda.set_sync_debug_mode("error") does the same (tests/gpu/layers.py).
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "is_nonzero",
    "equal",
    "allclose",
}
OF_NUMBERS = {"tensor", "as_tensor", "from_numpy"}
FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "zeros",
} | OF_NUMBERS
SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "_local_scalar_dense",
    "equal",
    "bincount",
    "histc",
}


class Waits:
    """The waits so far, as `file:line what`."""

    def __init__(self, host: Iterable[torch.Tensor]) -> None:
        self.found: list[str] = []
        self.kept: list[torch.UntypedStorage] = []
        """Storages of the host's tensors, held so that no other takes their address."""
        self.host: set[int] = set()
        for tensor in host:
            self.mark(tensor)

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """As the host's."""
        storage = tensor.untyped_storage()
        self.kept.append(storage)
        self.host.add(storage._cdata)
        return tensor

    def is_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.host

    def note(self, what: str) -> None:
        """With the innermost line of ours or of megatron-core."""
        frame = _caller()
        where = f"{frame.f_globals['__name__']}:{frame.f_lineno}" if frame is not None else "elsewhere"
        self.found.append(f"{where} {what}")


def _caller() -> types.FrameType | None:
    """The innermost call of ours or of megatron-core, the CPU door left out."""
    frame = sys._getframe(1)
    while frame is not None and not _is_watched(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def _is_watched(module: str) -> bool:
    return module.startswith(("megatron_share4v.", "megatron.core.")) and module != "megatron_share4v.mcore.cpu_patch"


class _Functions(TorchFunctionMode):
    """Calls of torch, where it can be seen whether a device was named."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        subject = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in READS and subject is not None and not self.waits.is_host(subject):
            self.waits.note(name)
        if name in FACTORIES and subject is None:
            if name in OF_NUMBERS and any(
                isinstance(value, torch.Tensor) and not self.waits.is_host(value) for value in tree_iter(args)
            ):
                self.waits.note(f"{name} of tensors")
            if kwargs.get("device") is None:
                result = func(*args, **kwargs)
                self.waits.mark(result)
                return result
            if name in OF_NUMBERS:
                self.waits.note(f"{name} with a device")
        if name in ("to", "cuda") and subject is not None and self.waits.is_host(subject):
            return self._moved(func, subject, args, kwargs)
        return func(*args, **kwargs)

    def _moved(self, func: Any, subject: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        """A copy to the device where one is named; a new tensor, as there."""
        result = func(*args, **kwargs)
        if not any(isinstance(value, (torch.device, str)) for value in (*args[1:], *kwargs.values())):
            return result
        caller = _caller()
        by_sent = caller is not None and (caller.f_globals["__name__"], caller.f_code.co_name) == (
            "megatron_share4v.parallel.device",
            "sent",
        )
        if not by_sent or not kwargs.get("non_blocking"):
            self.waits.note("copy to the device from memory that is not pinned")
        copy = result.clone()
        self.waits.host.discard(copy.untyped_storage()._cdata)
        return copy


class _Operations(TorchDispatchMode):
    """Operations, those of the backward pass too."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        result = func(*args, **kwargs)
        if not given:
            return result
        theirs = [tensor for tensor in given if not self.waits.is_host(tensor)]
        name = func.overloadpacket.__name__
        if not theirs:
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self.waits.mark(value)
        elif self._waits(name, func, args):
            self.waits.note(name)
        elif any(self.waits.is_host(tensor) and tensor.dim() for tensor in given):
            self.waits.note(f"{name} of tensors of the host and of the device")
        return result

    @staticmethod
    def _waits(name: str, func: Any, args: Any) -> bool:
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            return by_mask and not (
                name != "index" and args[2].numel() == 1
            )  # one value is filled in where the mask is
        return name in SIZED_BY_VALUES or (name == "repeat_interleave" and isinstance(args[-1], torch.Tensor))


@contextlib.contextmanager
def watched(*, host: Iterable[torch.Tensor] = ()) -> Iterator[Waits]:
    """Notices waits inside. `host`: tensors made before that are the host's; all other such tensors stand for the device's."""
    waits, state = Waits(host), torch.get_rng_state
    with (
        mock.patch.object(torch.cuda, "synchronize", lambda *_: waits.note("torch.cuda.synchronize")),
        mock.patch.object(torch, "get_rng_state", lambda: waits.mark(state())),  # of the host's generator
        _Functions(waits),
        _Operations(waits),
    ):
        yield waits
