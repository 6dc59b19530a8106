"""Merge adapters of peft and delta weights of the original LLaVA tools with their base model, one tensor at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_share4v.checkpoint.hf.adapters.config import CONFIG, ELSEWHERE, read_adapter_config
from megatron_share4v.checkpoint.hf.adapters.merge import FACTOR_NAMES, MergedWeight, check_factors, scaled_bias
from megatron_share4v.checkpoint.hf.naming import component_of, detect_naming, present_components, rename
from megatron_share4v.checkpoint.hf.source.reader import open_weights_file
from megatron_share4v.checkpoint.hf.weight_map import Naming
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, LazyTensors, check_float_dtypes, check_not_empty
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
REST = "non_lora_trainables.bin"
BUFFERS = ("inv_freq", "position_ids")
"""Name endings of buffers that follow from the configuration; their deltas are ignored."""
# A factor's name, perhaps with the adapter's own name ("default") and ".weight" after it.
_FACTOR = re.compile(
    rf"(?P<module>.+)\.(?P<factor>{'|'.join(FACTOR_NAMES)})(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<rest>weight|bias))?"
)
_PREFIX = re.compile(r"^(?:base_model\.model\.)?")
"""What peft writes before the names of the model that it wraps."""
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.")
"""Parts of names that peft adds around modules that it keeps whole."""


def is_adapter(directory: Path) -> bool:
    """Return whether `directory` holds an adapter of peft."""
    return (directory / CONFIG).is_file()


def merge_adapter(base: LazyTensors, directory: Path) -> dict[str, LazyTensor]:
    """Merge the adapter in `directory` into `base`; weights trained beside it (projector, tower, biases) replace or
    extend `base`. Names may be those of any release of transformers or LLaVA, in the adapter and in the base.

    Raises ConversionError naming a tensor that does not fit the base, and for kinds of adapters and settings that are
    not merged here.
    """
    config = read_adapter_config(directory / CONFIG)
    path = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise ConversionError(f"{directory}: has {CONFIG} and none of {', '.join(WEIGHTS)}; copy the adapter again")
    naming = detect_naming(base, title="base")
    adapter = open_weights_file(path)
    if not adapter:
        raise ConversionError(f"{path}: holds no tensors; copy the adapter again")
    check_not_empty(adapter)
    check_float_dtypes(adapter)
    modules, whole = _group(adapter, path)
    beside = _replacements(whole, base, naming, path)
    replaced = set(beside)
    if (directory / REST).is_file():
        beside |= _replacements(open_weights_file(directory / REST), base, naming, directory / REST)
    result = {**base, **beside}
    merged: set[str] = set()
    for module, factors in modules.items():
        name = rename(f"{module}.weight", naming)
        if name not in base:
            raise ConversionError(
                f"{path}: adapts {module}, and the base model has no {name}; give the base that it was trained on"
            )
        if name in merged:
            raise ConversionError(f"{path}: two modules of it adapt {name}; copy the adapter again")
        merged.add(name)
        check_factors(module, result[name], factors, config=config)
        # A base weight stored in the file is the one that the adapter was trained on: the residual, if there is one.
        residual = None if name in replaced else config.residual
        scale = config.scale_of(module) if config.kind != "IA3" else 1.0
        weight = MergedWeight(base=result[name], factors=factors, scale=scale, residual=residual)
        bias = scaled_bias(result, name, factors)
        if bias is not None:
            result[f"{name.removesuffix('weight')}bias"] = bias
        result[name] = replace(result[name], read=weight)
    how = f", on the base without its {config.residual} product" if config.residual else ""
    get_logger().info("%s: %d matrices merged%s, %d tensors beside them", config.kind, len(modules), how, len(beside))
    return result


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
class _DeltaSum:
    base: LazyTensor
    delta: LazyTensor

    def __call__(self) -> torch.Tensor:
        total = self.delta.read().float()
        total[: self.base.shape[0]] += self.base.read().float()
        return total.to(self.delta.dtype)


def _group(adapter: LazyTensors, path: Path) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """Split the tensors of an adapter into factors by module, and weights that were trained or stored whole."""
    modules: dict[str, dict[str, LazyTensor]] = {}
    whole = {}
    for name, tensor in adapter.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            whole[_WRAPPER.sub(".", name)] = tensor
        elif found["rest"] == "bias":
            raise ConversionError(f"{path}: {name}: biases of factors (lora_bias) are not merged here; {ELSEWHERE}")
        else:
            modules.setdefault(_PREFIX.sub("", found["module"]), {})[found["factor"]] = tensor
    return modules, whole


def _replacements(whole: LazyTensors, base: LazyTensors, naming: Naming, path: Path) -> dict[str, LazyTensor]:
    """Return the weights that replace the base's or belong to a component that it lacks, by name in the base.

    Raises ConversionError for other tensors and for another shape than the base's.
    """
    check_not_empty(whole)
    known = present_components(naming)
    result: dict[str, LazyTensor] = {}
    for name, tensor in whole.items():
        target = rename(name, naming)
        added = component_of(name)
        if target not in base and (added is None or added in known):
            raise ConversionError(
                f"{path}: {name} belongs to no adapted module and is not in the base model; "
                "give the base that it was trained on"
            )
        if target in base and base[target].shape != tensor.shape:
            raise ConversionError(
                f"{path}: wrong shape: {name} is {tensor.shape}, in the base {base[target].shape}; "
                "give the base that it was trained on"
            )
        if target in result:
            raise ConversionError(f"{path}: {name} occurs twice in it; copy the adapter again")
        result[target] = tensor
    return result
