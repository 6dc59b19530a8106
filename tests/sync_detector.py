"""Host-sync detector on the CPU: finds what would make the host wait for a GPU.

Tensors created without a device count as the host's; all others stand for tensors on the device. A host sync is:
reading a value of a device tensor, an operation whose output size depends on values, a copy between the two except by
parallel.device.to_device_async, and torch.cuda.synchronize. On a GPU, torch.cuda.set_sync_debug_mode("error") does the
same (tests/gpu/layers.py).
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


class HostSyncs:
    """Host syncs found so far, as `module:line what`."""

    def __init__(self, host: Iterable[torch.Tensor]) -> None:
        self.found: list[str] = []
        self.kept: list[torch.UntypedStorage] = []
        """Storages of host tensors, kept alive so that no other storage takes their address."""
        self.host: set[int] = set()
        for tensor in host:
            self.mark(tensor)

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a tensor as the host's and return it."""
        storage = tensor.untyped_storage()
        self.kept.append(storage)
        self.host.add(storage._cdata)
        return tensor

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the host's."""
        return tensor.untyped_storage()._cdata in self.host

    def record(self, what: str) -> None:
        """Record a host sync at the innermost line of this package or of megatron-core."""
        frame = _caller()
        where = f"{frame.f_globals['__name__']}:{frame.f_lineno}" if frame is not None else "elsewhere"
        self.found.append(f"{where} {what}")


def _caller() -> types.FrameType | None:
    """Return the innermost frame of this package or of megatron-core, without the CPU patch."""
    frame = sys._getframe(1)
    while frame is not None and not _is_watched(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def _is_watched(module: str) -> bool:
    return module.startswith(("megatron_share4v.", "megatron.core.")) and module != "megatron_share4v.mcore.cpu_patch"


class _Functions(TorchFunctionMode):
    """Intercepts torch functions, where it is visible whether a device was named."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        subject = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in READS and subject is not None and not self.syncs.is_host(subject):
            self.syncs.record(name)
        if name in FACTORIES and subject is None:
            if name in OF_NUMBERS and any(
                isinstance(value, torch.Tensor) and not self.syncs.is_host(value) for value in tree_iter(args)
            ):
                self.syncs.record(f"{name} of tensors")
            if kwargs.get("device") is None:
                result = func(*args, **kwargs)
                self.syncs.mark(result)
                return result
            if name in OF_NUMBERS:
                self.syncs.record(f"{name} with a device")
        if name in ("to", "cuda") and subject is not None and self.syncs.is_host(subject):
            return self._copy_to_device(func, subject, args, kwargs)
        return func(*args, **kwargs)

    def _copy_to_device(self, func: Any, subject: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        """Copy a host tensor where a device is named, to a new storage as a GPU would."""
        result = func(*args, **kwargs)
        if not any(isinstance(value, (torch.device, str)) for value in (*args[1:], *kwargs.values())):
            return result
        caller = _caller()
        is_pinned = caller is not None and (caller.f_globals["__name__"], caller.f_code.co_name) == (
            "megatron_share4v.parallel.device",
            "to_device_async",
        )
        if not is_pinned or not kwargs.get("non_blocking"):
            self.syncs.record("copy to the device from memory that is not pinned")
        copy = result.clone()
        self.syncs.host.discard(copy.untyped_storage()._cdata)
        return copy


class _Operations(TorchDispatchMode):
    """Intercepts operators, including those of the backward pass."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        result = func(*args, **kwargs)
        if not given:
            return result
        on_device = [tensor for tensor in given if not self.syncs.is_host(tensor)]
        name = func.overloadpacket.__name__
        if not on_device:
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self.syncs.mark(value)
        elif self._is_host_sync(name, func, args):
            self.syncs.record(name)
        elif any(self.syncs.is_host(tensor) and tensor.dim() for tensor in given):
            self.syncs.record(f"{name} of tensors of the host and of the device")
        return result

    @staticmethod
    def _is_host_sync(name: str, func: Any, args: Any) -> bool:
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            return by_mask and not (
                name != "index" and args[2].numel() == 1
            )  # fills one value in where the mask is set
        return name in SIZED_BY_VALUES or (name == "repeat_interleave" and isinstance(args[-1], torch.Tensor))


@contextlib.contextmanager
def detect_host_syncs(*, host: Iterable[torch.Tensor] = ()) -> Iterator[HostSyncs]:
    """Record host syncs in the block; `host`: existing host tensors, all other existing ones count as the device's."""
    syncs, state = HostSyncs(host), torch.get_rng_state
    with (
        mock.patch.object(torch.cuda, "synchronize", lambda *_: syncs.record("torch.cuda.synchronize")),
        mock.patch.object(torch, "get_rng_state", lambda: syncs.mark(state())),  # state of the host generator
        _Functions(syncs),
        _Operations(syncs),
    ):
        yield syncs
