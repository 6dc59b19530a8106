"""CPU replacements for the torch.cuda calls that megatron-core makes unconditionally.

Only callers inside `megatron.core` get the replacements; everyone else keeps stock torch (a global replacement breaks
inductor and transformers). Nothing is patched where CUDA is available. `tests/mcore/test_cpu_patch.py` lists the
patched calls and fails when upstream moves them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_CALLER = "megatron.core"
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


class CpuStream:
    """Replacement for a CUDA stream: a no-op, since CPU work is ordered.

    A class, since transformers annotates `torch.cuda.Stream | None`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *args: Any) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class CpuEvent(CpuStream):
    """Replacement for a CUDA event, with timing."""

    def record(self, stream: Any = None) -> None:
        """Record the current time."""
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True: the event is always complete."""
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Return the milliseconds from this event to `end`."""
        return 1e3 * (end._time - self._time)


class _CpuGenerators(dict):
    """Replacement for torch.cuda.default_generators: every index gives the CPU generator."""

    def __missing__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _patch_for_megatron(owner: Any, name: str, replacement: Callable) -> None:
    """Replace `owner.name` by a function that calls `replacement` for megatron-core and the original for all others."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_CALLER):
            return replacement(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _constant(value: Any) -> Callable:
    return lambda original, *args, **kwargs: value


def _to_cpu_device(device: Any) -> Any:
    return _CPU if device is not None and str(device).startswith("cuda") else device


def _factory(original: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    if "device" in kwargs:
        kwargs["device"] = _to_cpu_device(kwargs["device"])
    kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
    return original(*args, **kwargs)


def _to(original: Callable, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and isinstance(args[0], (str, torch.device)):
        args = (_to_cpu_device(args[0]), *args[1:])
    if "device" in kwargs:
        kwargs["device"] = _to_cpu_device(kwargs["device"])
    return original(tensor, *args, **kwargs)


def _no_compile(original: Callable, function: Callable | None = None, **options: Any) -> Callable:
    # Core decorates functions at import, and that loads torch's compiler: a third of a process's start time, for
    # functions that our layers never call. An optimizer loads part of it later anyway.
    return function if function is not None else lambda decorated: decorated


def _cuda_type_name(original: Callable, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    # The optimizers compare tensor.type() with 'torch.cuda.FloatTensor'.
    result = original(tensor, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def patch_cuda_for_cpu() -> bool:
    """Install the replacements; return True when they are in place.

    Must run before megatron.core is first imported. A second call changes nothing.
    """
    if torch.cuda.is_available():
        return False
    if isinstance(torch.cuda.default_generators, _CpuGenerators):
        return True
    assert not any(name.startswith(_CALLER) for name in sys.modules), (
        "torch.cuda must be patched before megatron.core is imported"
    )
    # The first use of `torch.device` as a context records which functions are factories: it must see the originals.
    with torch.device("cpu"):
        torch.empty(0)
    cuda = torch.cuda
    constants = {
        "current_device": _CPU,
        "device_count": 1,
        "synchronize": None,
        "empty_cache": None,
        "set_device": None,
        "_lazy_init": None,
    }
    for name, value in constants.items():
        _patch_for_megatron(cuda, name, _constant(value))
    for name in ("current_stream", "default_stream", "stream"):
        _patch_for_megatron(cuda, name, lambda original, *args, **kwargs: CpuStream())
    for name in ("range_push", "range_pop"):
        _patch_for_megatron(cuda.nvtx, name, _constant(None))
    _patch_for_megatron(cuda, "_lazy_call", lambda original, callback, **kwargs: callback())
    for owner in (cuda, cuda.random):
        _patch_for_megatron(owner, "manual_seed", lambda original, seed: torch.manual_seed(seed))
        _patch_for_megatron(owner, "get_rng_state", lambda original, *args, **kwargs: torch.get_rng_state())
        _patch_for_megatron(owner, "set_rng_state", lambda original, state, *args, **kwargs: torch.set_rng_state(state))
    for name, value in {"default_generators": _CpuGenerators(), "Stream": CpuStream, "Event": CpuEvent}.items():
        setattr(cuda, name, value)
    _patch_for_megatron(torch, "compile", _no_compile)
    for name in _FACTORIES:
        _patch_for_megatron(torch, name, _factory)
    _patch_for_megatron(torch.Tensor, "to", _to)
    _patch_for_megatron(torch.Tensor, "type", _cuda_type_name)
    for movable in (torch.Tensor, torch.nn.Module):
        _patch_for_megatron(movable, "cuda", lambda original, self, *args, **kwargs: self)
    return True
