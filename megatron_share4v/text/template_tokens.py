"""Special tokens of a template in a tokenizer: whether it has them, ids that end an answer, ids trained everywhere."""

from __future__ import annotations

from megatron_share4v.errors import DataError
from megatron_share4v.text.template import TEMPLATES
from megatron_share4v.text.template_format import Template
from megatron_share4v.text.tokenizer import Tokenizer


def check_special_tokens(template: Template, tokenizer: Tokenizer) -> None:
    """Raise DataError, naming the templates that fit, when the tokenizer does not have a template's special tokens."""
    missing = [name for name in template.special_tokens if name not in tokenizer.special_pieces]
    if missing:
        fitting = fitting_templates(tokenizer)
        raise DataError(
            f"template {template.name!r} writes {' and '.join(missing)}, no special token of the tokenizer "
            f"{tokenizer.path}, so an answer would have no end; use the template of this language model"
            + (f" (it has the tokens of {', '.join(fitting)})" if fitting else "")
        )


def fitting_templates(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the templates with special tokens that are all the tokenizer's."""
    return [
        name
        for name, template in TEMPLATES.items()
        if name == template.name and template.special_tokens and {*template.special_tokens} <= tokenizer.special_pieces
    ]


def stop_ids(template: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end an answer: of the template's stop tokens, and the tokenizer's end of a text."""
    found = {tokenizer.token_id(name) for name in template.stop_tokens if name in tokenizer.special_pieces}
    return frozenset({tokenizer.eos_id, *(i for i in found if i is not None)})


def marker_ids(template: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that are trained wherever they are; none unless the template's trained_markers is "official".

    Raises DataError when a marker is not one token.
    """
    if template.trained_markers != "official":
        return frozenset()
    found = {name: tokenizer.encode(name) for name in template.official_markers}
    several = [name for name, ids in found.items() if len(ids) != 1]
    if several:
        raise DataError(
            f"trained_markers official: {several[0]!r} is not one token of {tokenizer.path}, as in the tokenizers that "
            f"template {template.name!r} was published with; set trained_markers to answer_only"
        )
    return frozenset(ids[0] for ids in found.values())
