"""Detect the prefixes of a model's tensor names from the names: every release of transformers and LLaVA has its own.

A component that occurs twice is refused here; the weight map checks completeness.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_share4v.checkpoint.hf.weight_map import Component, Naming
from megatron_share4v.errors import ConversionError

# Name endings of the tensors that locate each component.
TOWER = "embeddings.class_embedding"
DECODER = "embed_tokens.weight"
HEAD = "lm_head.weight"
PROJECTORS_MLP = (
    ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    ("mm_projector.0.", "mm_projector.2."),
)
PROJECTOR_LINEAR = "mm_projector."


def detect_naming(names: Iterable[str], *, title: str) -> Naming:
    """Return the prefix of each component found in `names`; None for a missing component.

    Raises ConversionError naming two tensors when there are two towers, projectors or language models.
    """
    names = tuple(names)
    mlp, projectors = None, []
    for first, second in PROJECTORS_MLP:
        prefix = _prefix(names, f"{first}weight", what="projectors")
        if prefix is not None:
            mlp = (f"{prefix}{first}", f"{prefix}{second}")
            projectors.append(f"{prefix}{first}weight")
    linear = _prefix(names, f"{PROJECTOR_LINEAR}weight", what="projectors")
    if linear is not None:
        projectors.append(f"{linear}{PROJECTOR_LINEAR}weight")
    if len(projectors) > 1:
        raise ConversionError(f"two projectors: {projectors[0]} and {projectors[1]}; leave one of them out")
    head = _prefix(names, HEAD, what="heads")
    return Naming(
        title=title,
        tower=_prefix(names, TOWER, what="towers"),
        projector_mlp=mlp,
        projector_linear=None if linear is None else f"{linear}{PROJECTOR_LINEAR}",
        decoder=_prefix(names, DECODER, what="language models"),
        head=None if head is None else f"{head}lm_head.",
    )


def present_components(naming: Naming) -> tuple[Component, ...]:
    """Return the components for which `naming` has a prefix."""
    present: dict[Component, bool] = {
        "vision": naming.tower is not None,
        "projector": naming.projector_mlp is not None or naming.projector_linear is not None,
        "language": naming.decoder is not None,
    }
    return tuple(component for component, has in present.items() if has)


def _prefix(names: tuple[str, ...], ending: str, *, what: str) -> str | None:
    found = sorted(name for name in names if name == ending or name.endswith(f".{ending}"))
    if len(found) > 1:
        raise ConversionError(f"two {what}: {found[0]} and {found[1]}; leave one of them out")
    return found[0].removesuffix(ending) if found else None
