"""Read the adapter_config.json of a peft adapter: which kind it is, its ranks and scales, and how it was initialised.

Every key is known to leave the merged weights alone, is used by the merge, or must be unset: an adapter whose
arithmetic is not understood is refused with the key's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_share4v.checkpoint.hf.source.reader import read_json
from megatron_share4v.errors import ConversionError

CONFIG = "adapter_config.json"
Kind = Literal["LORA", "LOHA", "LOKR", "IA3"]
Residual = Literal["pissa", "olora"]
Number = TypeVar("Number", int, float)
ELSEWHERE = "merge it with peft (merge_and_unload) and import the result"

PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)
"""Kinds that add virtual tokens or states to the input and leave the weights as they are."""

# Keys that have no influence on the merged weights: the tensors of the file show which modules and layers were trained.
ANY_VALUE = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
}
TRAINING_ONLY: dict[Kind, set[str]] = {
    "LORA": {
        "bias",  # trained biases are in the file, whole
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "velora_config",
        "ensure_weight_tying",
        "runtime_config",
        # Settings of initialisations, which init_lora_weights names.
        "loftq_config",
        "corda_config",
        "lora_ga_config",
    },
    "LOHA": {"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"},
    "LOKR": {
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
        "use_effective_conv2d",
        "init_weights",
        "decompose_both",
        "decompose_factor",
    },
    "IA3": {"feedforward_modules", "init_ia3_weights"},
}
USED: dict[Kind, set[str]] = {
    "LORA": {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"},
    "LOHA": {"r", "alpha", "rank_pattern", "alpha_pattern"},
    "LOKR": {"r", "alpha", "rank_pattern", "alpha_pattern"},
    "IA3": set(),
}
UNSET: tuple[Any, ...] = (None, False, 0, "", [], {})

BASE_UNCHANGED = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base model as it is."""
RESIDUALS: tuple[Residual, ...] = ("pissa", "olora")
"""Values of init_lora_weights that take the initial product out of the base model, and that can be computed again."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of an adapter that determine the merged weights."""

    kind: Kind
    path: Path
    rank: int = 0
    alpha: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of modules by regular expressions of their names' ends."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    decomposed: bool = False
    """DoRA: the columns' directions are adapted, their magnitudes are stored."""
    residual: Residual | None = None
    """Decomposition of the base weights whose product was taken out of them before training."""

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration states for a module, by its full name in the adapted model."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of the adapter's product for a module, by its full name in the adapted model."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an adapter_config.json.

    Raises ConversionError naming a kind or a key that the merge does not know.
    """
    config = read_json(path)
    kind = _kind(config, path)
    for key, value in config.items():
        if key not in ANY_VALUE | TRAINING_ONLY[kind] | USED[kind] and value not in UNSET:
            raise ConversionError(f"{path}: {key} is {value!r}, which is not merged here; {ELSEWHERE}")
    if kind == "IA3":
        return AdapterConfig(kind=kind, path=path)
    return AdapterConfig(
        kind=kind,
        path=path,
        rank=_rank(config.get("r"), "r", path),
        alpha=_alpha(config.get(alpha := "lora_alpha" if kind == "LORA" else "alpha"), alpha, path),
        rank_pattern=_by_module(config, "rank_pattern", _rank, path),
        alpha_pattern=_by_module(config, "alpha_pattern", _alpha, path),
        rank_stabilised=bool(config.get("use_rslora")),
        decomposed=bool(config.get("use_dora")),
        residual=_residual(config.get("init_lora_weights"), path),
    )


def _kind(config: Mapping[str, Any], path: Path) -> Kind:
    kind: Any = config.get("peft_type")
    if kind in PROMPTS:
        raise ConversionError(
            f"{path}: peft_type is {kind!r}, which adds virtual tokens to the prompt and changes no weights: "
            "there is nothing to merge; train a LoRA adapter, or use this one with peft"
        )
    if not isinstance(kind, str) or kind not in USED:
        raise ConversionError(
            f"{path}: peft_type is {kind!r}, which is not merged here ({', '.join(USED)} are); {ELSEWHERE}"
        )
    return kind


def _rank(value: Any, name: str, path: Path) -> int:
    if type(value) is not int or value <= 0:
        raise ConversionError(f"{path}: {name} is {value!r}; expected a positive integer: copy the adapter again")
    return value


def _alpha(value: Any, name: str, path: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConversionError(f"{path}: {name} is {value!r}; expected a positive number: copy the adapter again")
    return value


def _by_module(
    config: Mapping[str, Any], key: str, check: Callable[[Any, str, Path], Number], path: Path
) -> dict[str, Number]:
    """Return the values of `key` by the pattern of modules. Raises ConversionError."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: {key} is {found!r}; expected an object: copy the adapter again")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConversionError(
                f"{path}: {key} has {pattern!r}, which is no regular expression ({error}): copy the adapter again"
            ) from error
    return {pattern: check(value, f"{key}[{pattern!r}]", path) for pattern, value in found.items()}


def _residual(initialised: Any, path: Path) -> Residual | None:
    if initialised in RESIDUALS:
        return initialised
    if initialised in BASE_UNCHANGED:
        return None
    raise ConversionError(
        f"{path}: init_lora_weights is {initialised!r}: the adapter belongs to a base that this initialisation changed "
        "and that cannot be computed again from the published one; save the adapter with peft's "
        "path_initial_model_for_weight_conversion, which makes it a plain LoRA, or merge it where its base is"
    )


def _by_pattern(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first regular expression that fits the end of a module's name, as peft does."""
    return next(
        (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)),
        default,
    )
