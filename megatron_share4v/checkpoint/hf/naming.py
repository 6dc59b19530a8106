"""Detect the prefixes of a model's tensor names from the names: every release of transformers and LLaVA has its own.

A component that occurs twice is refused here; the weight map checks completeness.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from megatron_share4v.checkpoint.hf.families import TOWER_FAMILIES
from megatron_share4v.checkpoint.hf.weight_map import SHARE4V, Component, Naming, sequential_layers
from megatron_share4v.errors import ConversionError

# Name endings of the tensors that locate each component. SigLIP has no class token, so the patch convolution does.
TOWERS = tuple(dict.fromkeys(f"{family.names.patch}.weight" for family in TOWER_FAMILIES.values()))
DECODER = "embed_tokens.weight"
HEAD = "lm_head.weight"
PROJECTOR_MLP_HF = ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2.")
PROJECTOR_LINEAR = "mm_projector."

# What is the same in the tensor names of every release, by component. The tower's layers are searched first, because
# "layers.0." is part of "encoder.layers.0.".
_IN_TOWER = re.compile(
    r"(?:^|\.)((?:encoder\.layers?\.\d+|embeddings|pre_layrnorm|post_layernorm|layernorm"
    r"|head\.(?:probe|attention|layernorm|mlp))(?:\..+)?)$"
)
_IN_DECODER = re.compile(r"(?:^|\.)((?:layers\.\d+|embed_tokens|norm)\..+)$")
_IN_MLP = re.compile(
    r"(?:^|\.)(?:multi_modal_projector\.linear_([12])|mm_projector\.([02468]|1[0246]))\.(weight|bias)$"
)
_IN_LINEAR = re.compile(r"(?:^|\.)mm_projector\.(weight|bias)$")
_IN_HEAD = re.compile(r"(?:^|\.)lm_head\.(.+)$")


def detect_naming(names: Iterable[str], *, title: str) -> Naming:
    """Return the prefix of each component found in `names`; None for a missing component.

    Raises ConversionError naming two tensors when there are two towers, projectors or language models.
    """
    names = tuple(names)
    mlp: tuple[str, ...] | None = None
    projectors = []
    for layers in (PROJECTOR_MLP_HF, sequential_layers(PROJECTOR_LINEAR)):
        prefix = _prefix(names, f"{layers[0]}weight", what="projectors")
        if prefix is not None:
            mlp = tuple(f"{prefix}{layer}" for layer in layers)
            projectors.append(f"{mlp[0]}weight")
    linear = _prefix(names, f"{PROJECTOR_LINEAR}weight", what="projectors")
    if linear is not None:
        projectors.append(f"{linear}{PROJECTOR_LINEAR}weight")
    if len(projectors) > 1:
        raise ConversionError(f"two projectors: {projectors[0]} and {projectors[1]}; leave one of them out")
    head = _prefix(names, HEAD, what="heads")
    marker = find_tower_tensor(names)
    tower = None if marker is None else marker.removesuffix(next(end for end in TOWERS if marker.endswith(end)))
    return Naming(
        title=title,
        tower=tower,
        in_memory=tower is not None and any(name in names for name in _names_in_memory(tower)),
        projector_mlp=mlp,
        projector_linear=None if linear is None else f"{linear}{PROJECTOR_LINEAR}",
        decoder=_prefix(names, DECODER, what="language models"),
        head=None if head is None else f"{head}lm_head.",
    )


def find_tower_tensor(names: Iterable[str]) -> str | None:
    """Return the name of the tower's patch convolution; None without a tower.

    Raises ConversionError when there are two.
    """
    found = sorted(name for name in names if any(name == end or name.endswith(f".{end}") for end in TOWERS))
    if len(found) > 1:
        raise ConversionError(f"two towers: {found[0]} and {found[1]}; leave one of them out")
    return found[0] if found else None


def _names_in_memory(tower: str) -> Iterator[str]:
    """Yield the tensor names in the first block that only transformers 5's classes have."""
    for family in TOWER_FAMILIES.values():
        if family.names_in_memory is not None:
            yield f"{tower}{family.names.blocks}0.{family.names_in_memory.query}.weight"


def present_components(naming: Naming) -> tuple[Component, ...]:
    """Return the components for which `naming` has a prefix."""
    present: dict[Component, bool] = {
        "vision": naming.tower is not None,
        "projector": naming.projector_mlp is not None or naming.projector_linear is not None,
        "language": naming.decoder is not None,
    }
    return tuple(component for component, has in present.items() if has)


def component_of(name: str) -> Component | None:
    """Return the component of a tensor of any release of transformers or LLaVA; None for unknown names."""
    if _IN_TOWER.search(name):
        return "vision"
    if _IN_MLP.search(name) or _IN_LINEAR.search(name):
        return "projector"
    return "language" if _IN_DECODER.search(name) or _IN_HEAD.search(name) else None


def rename(name: str, naming: Naming) -> str:
    """Return the name that a tensor of any release of transformers or LLaVA has in `naming`.

    A component that `naming` does not have gets the name of the official code; other names are returned unchanged.
    """
    if found := _IN_TOWER.search(name):
        return (naming.tower or SHARE4V.tower or "") + found[1]
    if found := _IN_DECODER.search(name):
        return (naming.decoder or SHARE4V.decoder or "") + found[1]
    if found := _IN_HEAD.search(name):
        return (naming.head or SHARE4V.head or "") + found[1]
    if found := _IN_MLP.search(name):
        layers = naming.projector_mlp or SHARE4V.projector_mlp or ("", "")
        return layers[int(found[1]) - 1 if found[1] else int(found[2]) // 2] + found[3]
    if found := _IN_LINEAR.search(name):
        return (naming.projector_linear or SHARE4V.projector_linear or "") + found[1]
    return name


def _prefix(names: tuple[str, ...], ending: str, *, what: str) -> str | None:
    found = sorted(name for name in names if name == ending or name.endswith(f".{ending}"))
    if len(found) > 1:
        raise ConversionError(f"two {what}: {found[0]} and {found[1]}; leave one of them out")
    return found[0].removesuffix(ending) if found else None
