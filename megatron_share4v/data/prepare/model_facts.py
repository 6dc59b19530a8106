"""Facts of a run's model that its data depends on, in words: positions per image, rows of the vocabulary, template."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.text.template import get_template
from megatron_share4v.text.template_format import Template
from megatron_share4v.text.template_tokens import fitting_templates
from megatron_share4v.text.tokenizer import Tokenizer, image_token_id


def format_model_facts(model: ModelConfig, tokenizer: Tokenizer, template: str) -> str:
    """Describe the model of a run for its tokenizer and conversation template; what does not fit starts with `!`."""
    lines = [
        ("tower", _describe_tower(model.vision)),
        ("language", _describe_language(model.language)),
        *(("vocabulary", line) for line in _describe_vocabulary(model.language, tokenizer)),
        *(("template", line) for line in _describe_template(get_template(template), tokenizer)),
    ]
    return "\n".join(f"{name:<12}{line}" for name, line in lines)


def _describe_tower(vision: VisionConfig) -> str:
    side = vision.image_size // vision.patch_size
    unseen = vision.image_size - side * vision.patch_size
    parts = [
        f"{vision.model_type} at {vision.image_size} px, {vision.num_built_layers} of {vision.num_layers} blocks",
        f"{side} x {side} patches, {vision.num_features} positions per image",
    ]
    if unseen:
        parts.append(f"the last {unseen} pixels right and below are not seen")
    return "; ".join(parts)


def _describe_language(language: LanguageConfig) -> str:
    heads, groups = language.num_attention_heads, language.num_key_value_heads
    attention = f"{heads} query heads" + (f" and {groups} key-value heads" if groups != heads else "")
    tied = ", head tied to the embedding" if language.tie_word_embeddings else ""
    return f"{language.model_type}, {language.num_layers} layers, {attention}{tied}"


def _describe_vocabulary(language: LanguageConfig, tokenizer: Tokenizer) -> Iterator[str]:
    rows, tokens, image = language.vocab_size, tokenizer.vocab_size, image_token_id(tokenizer)
    if tokens > rows:
        yield f"! the tokenizer has {tokens} tokens, more than the {rows} rows: name the model's own tokenizer"
        return
    place = "a spare row" if image < rows else "a new row"
    place = "the tokenizer's own" if image < tokens else place
    yield f"{rows} rows, {tokens} tokens, {rows - tokens} spare rows; <image> in exports: {image}, {place}"


def _describe_template(template: Template, tokenizer: Tokenizer) -> Iterator[str]:
    fitting = f"templates with special tokens of this tokenizer: {', '.join(fitting_templates(tokenizer)) or 'none'}"
    missing = [name for name in template.special_tokens if name not in tokenizer.special_pieces]
    if missing:
        yield f"! {template.name} writes {' and '.join(missing)}, no special token of this tokenizer; {fitting}"
        return
    end = template.training.answer[1].strip()
    yield f"{template.name}, answers end with {end or 'a newline and no token'}; {fitting}"
