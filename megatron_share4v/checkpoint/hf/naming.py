"""Which prefixes a model's tensor names have, read off the names themselves: every release of transformers and of LLaVA has its own.

A part of the model that is there twice is refused here; whether all of it is there is checked by the weight map.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_share4v.checkpoint.hf.weight_map import Component, Naming
from megatron_share4v.errors import ConversionError

# How the one tensor ends that tells where a part of the model lies.
TOWER = "embeddings.class_embedding"
DECODER = "embed_tokens.weight"
HEAD = "lm_head.weight"
PROJECTORS_MLP = (
    ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    ("mm_projector.0.", "mm_projector.2."),
)
PROJECTOR_LINEAR = "mm_projector."


def detect_naming(names: Iterable[str], *, title: str) -> Naming:
    """The prefixes of the parts that are among `names`; None for those that are not.

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
    """The parts of the model that `naming` has a place for."""
    there = {
        "vision": naming.tower is not None,
        "projector": naming.projector_mlp is not None or naming.projector_linear is not None,
        "language": naming.decoder is not None,
    }
    return tuple(component for component, has in there.items() if has)


def _prefix(names: tuple[str, ...], ending: str, *, what: str) -> str | None:
    found = sorted(name for name in names if name == ending or name.endswith(f".{ending}"))
    if len(found) > 1:
        raise ConversionError(f"two {what}: {found[0]} and {found[1]}; leave one of them out")
    return found[0].removesuffix(ending) if found else None
