"""Merge LoRA adapters and delta weights of the original LLaVA tools with their base model, one tensor at a time.

Hu et al. 2021, LoRA: W + alpha / r * B A. Sums are computed in fp32 and rounded once to the base's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_share4v.checkpoint.hf.reader import open_weights_file, read_json
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, LazyTensors
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
REST = "non_lora_trainables.bin"
BUFFERS = ("inv_freq", "position_ids")
"""Name endings of buffers that follow from the configuration; their deltas are ignored."""


def is_adapter(directory: Path) -> bool:
    """Return whether `directory` holds a LoRA adapter."""
    return (directory / CONFIG).is_file()


def merge_lora(base: LazyTensors, directory: Path) -> dict[str, LazyTensor]:
    """Merge the adapter in `directory` into `base`; weights trained beside it (projector, tower) replace or extend
    `base`.

    Raises ConversionError naming a tensor that does not fit the base, and for unsupported kinds of adapters.
    """
    config = read_json(directory / CONFIG)
    for key, neutral in (("use_dora", False), ("fan_in_fan_out", False), ("rank_pattern", {}), ("alpha_pattern", {})):
        if config.get(key) not in (None, neutral):
            raise ConversionError(
                f"{directory / CONFIG}: {key} is {config[key]!r}; merge it with the tool that trained it"
            )
    path = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise ConversionError(f"{directory}: has {CONFIG} and none of {', '.join(WEIGHTS)}; copy the adapter again")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    result = dict(base)
    pairs = _pairs({_base_name(name): tensor for name, tensor in open_weights_file(path).items()}, path)
    for name, (down, up) in pairs.items():
        if name not in base:
            raise ConversionError(
                f"{path}: adapts {name}, which the base model does not have; give the base that it was trained on"
            )
        if (up.shape[0], down.shape[1]) != base[name].shape:
            raise ConversionError(
                f"{path}: wrong shape: {name} is {base[name].shape} in the base, "
                f"{(up.shape[0], down.shape[1])} in the adapter"
            )
        result[name] = replace(base[name], read=_LoraSum(base[name], down, up, scale))
    rest = (
        {_base_name(name): tensor for name, tensor in open_weights_file(directory / REST).items()}
        if (directory / REST).is_file()
        else {}
    )
    get_logger().info(
        "LoRA: %d matrices merged (rank %d, alpha %s), %d tensors beside it", len(pairs), rank, alpha, len(rest)
    )
    return {**result, **rest}


def merge_delta(base: LazyTensors, delta: LazyTensors) -> dict[str, LazyTensor]:
    """Add delta weights to `base` as LLaVA's apply_delta does.

    The projector, the tower and new vocabulary rows are stored whole rather than as differences.
    """
    result = {}
    for name, tensor in delta.items():
        if name.endswith(BUFFERS):
            continue
        if name not in base:
            if "mm_projector" not in name and "vision_tower" not in name:
                raise ConversionError(
                    f"{tensor.origin}: {name} is not in the base model; give the base that the delta was made from"
                )
            result[name] = tensor
            continue
        vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        shape, other = tensor.shape, base[name].shape
        if shape != other and not (vocabulary and shape[1:] == other[1:] and shape[0] > other[0]):
            raise ConversionError(f"{tensor.origin}: wrong shape: {name} is {shape} in the delta, {other} in the base")
        result[name] = replace(tensor, read=_DeltaSum(base[name], tensor))
    missing = [name for name in base if name not in delta and not name.endswith(BUFFERS)]
    if missing:
        raise ConversionError(f"missing tensor: {missing[0]} is in the base and not in the delta; copy the delta again")
    return result


@dataclass(frozen=True)
class _LoraSum:
    base: LazyTensor
    down: LazyTensor
    up: LazyTensor
    scale: float

    def __call__(self) -> torch.Tensor:
        change = self.up.read().float() @ self.down.read().float() * self.scale
        return (self.base.read().float() + change).to(self.base.dtype)


@dataclass(frozen=True)
class _DeltaSum:
    base: LazyTensor
    delta: LazyTensor

    def __call__(self) -> torch.Tensor:
        total = self.delta.read().float()
        total[: self.base.shape[0]] += self.base.read().float()
        return total.to(self.delta.dtype)


def _base_name(name: str) -> str:
    """Strip the prefixes that peft adds to the names of the model that it wraps."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name


def _pairs(adapter: LazyTensors, path: Path) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    pairs: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    for name, tensor in adapter.items():
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            if other not in adapter:
                raise ConversionError(f"{path}: missing tensor: {other}; copy the adapter again")
            pairs[name.replace(".lora_A.default.", ".lora_A.").replace(".lora_A.", ".")] = (tensor, adapter[other])
        elif ".lora_B." not in name:
            raise ConversionError(f"{path}: {name} belongs to no LoRA pair; only plain LoRA is merged")
    return pairs
