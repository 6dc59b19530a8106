"""The CPU door: megatron-core assumes torch.cuda; where there is no CUDA, its calls are answered with CPU equivalents.

Only callers inside `megatron.core` are answered; everybody else keeps stock torch (a redirect for all callers breaks inductor
and transformers). Nothing happens where CUDA is available. `tests/mcore/test_cpu_patch.py` lists the touch points and fails when upstream moves them.
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
    """Stands for a CUDA stream: everything is already in order on a CPU. A class, since transformers annotates `torch.cuda.Stream | None`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *args: Any) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CpuEvent(CpuStream):
    """Stands for a CUDA event; can time."""

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from this event to `end`."""
        return 1e3 * (end._time - self._time)


class _CpuGenerators(dict):
    """torch.cuda.default_generators[i] is the CPU generator, whatever i."""

    def __missing__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _patch_for_megatron(owner: Any, name: str, reply: Callable) -> None:
    """Replace `owner.name` by a function that gives `reply` to megatron-core and the original to all others."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def door(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_CALLER):
            return reply(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, door)


def _constant(value: Any) -> Callable:
    return lambda original, *args, **kwargs: value


def _on_cpu(device: Any) -> Any:
    return _CPU if device is not None and str(device).startswith("cuda") else device


def _factory(original: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    if "device" in kwargs:
        kwargs["device"] = _on_cpu(kwargs["device"])
    kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
    return original(*args, **kwargs)


def _to(original: Callable, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and isinstance(args[0], (str, torch.device)):
        args = (_on_cpu(args[0]), *args[1:])
    if "device" in kwargs:
        kwargs["device"] = _on_cpu(kwargs["device"])
    return original(tensor, *args, **kwargs)


def _as_written(original: Callable, function: Callable | None = None, **options: Any) -> Callable:
    # Core decorates at import; that loads torch's compiler, a third of a process's start, for functions none of which our layers call.
    # Where an optimizer is used, it loads a part of it later all the same.
    return function if function is not None else lambda decorated: decorated


def _type(original: Callable, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    # The optimizers compare tensor.type() with 'torch.cuda.FloatTensor'.
    result = original(tensor, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def patch_cuda_for_cpu() -> bool:
    """Install the answers; True when they are in place. Must run before megatron.core is first imported; a second call changes nothing."""
    if torch.cuda.is_available():
        return False
    if isinstance(torch.cuda.default_generators, _CpuGenerators):
        return True
    assert not any(name.startswith(_CALLER) for name in sys.modules), (
        "the CPU door must be opened before megatron.core is imported"
    )
    with torch.device("cpu"):
        torch.empty(
            0
        )  # at its first use `torch.device` as a context notes which functions are factories: these, not the ones put below
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
    cuda.default_generators = _CpuGenerators()
    cuda.Stream, cuda.Event = CpuStream, CpuEvent
    _patch_for_megatron(torch, "compile", _as_written)
    for name in _FACTORIES:
        _patch_for_megatron(torch, name, _factory)
    _patch_for_megatron(torch.Tensor, "to", _to)
    _patch_for_megatron(torch.Tensor, "type", _type)
    for owner in (torch.Tensor, torch.nn.Module):
        _patch_for_megatron(owner, "cuda", lambda original, self, *args, **kwargs: self)
    return True
