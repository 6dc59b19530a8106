"""Find the conversation template that a Hugging Face model was trained with, from the files beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.checkpoint.hf.chat_template import detect_template, recognise_template
from megatron_share4v.checkpoint.hf.source.reader import read_json
from megatron_share4v.errors import ConversionError
from megatron_share4v.files import read_text
from megatron_share4v.logging import get_logger
from megatron_share4v.text.template import TEMPLATES, get_template
from megatron_share4v.text.template_tokens import check_special_tokens
from megatron_share4v.text.tokenizer import Tokenizer

PROVENANCE = "provenance.json"
"""File of exported models: their conversation template, tokenizer rule, and the hashes of their components."""
FAMILY_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "llama": ("llama_3",),
    "qwen2": ("qwen_2.5",),
    "qwen3": ("qwen_3",),
    "mistral": ("mistral",),
}
"""Usual templates of the families, by Hugging Face's model_type."""
ASSUMED = ("vicuna_v1", "llama_3", "qwen_3", "phi_3")
"""Templates to assume, the first of which ShareGPT4V and LLaVA-1.5 were trained with; their files do not name it."""
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATE_FILES = ("chat_template.json", "tokenizer_config.json", "processor_config.json")


@dataclass(frozen=True)
class SourceTemplate:
    """Name of a conversation template, and the reason for it. assumed: no file of the model states it."""

    name: str
    reason: str
    assumed: bool = False


def choose_template(directories: Sequence[Path], given: str | None, *, tokenizer: Tokenizer, model_type: str) -> str:
    """Return the template to import a model with.

    It is `given`, or else that of its files, or else the usual one of its language model's family (`model_type`, and
    the special tokens of `tokenizer`), with a warning. Raises ConfigError for an unknown `given`; ConversionError for a
    damaged file; DataError when the tokenizer does not have the template's special tokens.
    """
    if given is not None:
        template = get_template(given)
    else:
        found = find_template(directories, default=family_template(tokenizer, model_type))
        template = get_template(found.name)
        if found.assumed:
            get_logger().warning(
                "template: %s is assumed, because %s. If the model was trained with another conversation template, "
                "import it with tools/convert.py import --template NAME (one of %s)",
                found.name,
                found.reason,
                ", ".join(sorted({template.name for template in TEMPLATES.values()})),
            )
        else:
            get_logger().info("template: %s, from %s", found.name, found.reason)
    check_special_tokens(template, tokenizer)
    return template.name


def family_template(tokenizer: Tokenizer, model_type: str) -> str:
    """Return the usual template of a family of language models, of those whose special tokens the tokenizer has."""
    usual = [*FAMILY_TEMPLATES.get(model_type, ()), *ASSUMED]
    return next((name for name in usual if {*TEMPLATES[name].special_tokens} <= tokenizer.special_pieces), "plain")


def find_template(directories: Sequence[Path], *, default: str = ASSUMED[0]) -> SourceTemplate:
    """Recognise the conversation template of a model in `directories` (the model, then its base model)."""
    foreign = None
    for directory in directories:
        provenance = directory / PROVENANCE
        stated = read_json(provenance).get("template") if provenance.is_file() else None
        if stated is not None:
            if stated not in TEMPLATES:
                raise ConversionError(f"{provenance}: template {stated!r} is not known here; give one with --template")
            return SourceTemplate(name=stated, reason=str(provenance))
        for path, source in _chat_templates(directory):
            name = detect_template(source)
            if name is not None:
                return SourceTemplate(name=name, reason=str(path))
            name = recognise_template(source)
            if name is not None:
                return SourceTemplate(name=name, reason=f"the markers that the chat template in {path} writes")
            foreign = foreign or path
    if foreign is not None:
        reason = f"the chat template in {foreign} is none of this project's"
    elif default == ASSUMED[0]:
        reason = f"no file in {directories[0]} states a template; ShareGPT4V and LLaVA-1.5 were trained with this one"
    else:
        reason = f"no file in {directories[0]} states a template; it is the usual one of this family of language models"
    return SourceTemplate(name=default, reason=reason, assumed=True)


def _chat_templates(directory: Path) -> Iterator[tuple[Path, str]]:
    """Yield the Jinja chat templates of a model's files, where transformers looks for them."""
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        yield path, read_text(path)
    for name in CHAT_TEMPLATE_FILES:
        path = directory / name
        content = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(content, str):
            yield path, content
        elif isinstance(content, list):  # several by name
            for entry in content:
                if (
                    isinstance(entry, dict)
                    and entry.get("name") == "default"
                    and isinstance(entry.get("template"), str)
                ):
                    yield path, entry["template"]
