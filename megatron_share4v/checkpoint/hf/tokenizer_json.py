"""Export a tokenizer.json tokenizer: its own file with <image> and, without a padding token, <pad> added; and the
settings beside it.

Ids equal those of text/hf_tokenizer.py for every text without <image>. Writes no files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_share4v.errors import ConversionError
from megatron_share4v.text.hf_tokenizer import HfTokenizer
from megatron_share4v.text.template import IMAGE_PLACEHOLDER, Template
from megatron_share4v.text.template_tokens import check_special_tokens, stop_ids
from megatron_share4v.text.tokenizer import LAYOUT_TOKENS, PAD, Tokenizer, image_token_id

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class ExportedHfTokenizer:
    """A tokenizer.json with the tokens of the layout llava-hf, for a model that is used with `template`."""

    tokenizer: HfTokenizer
    template: Template

    @property
    def image_id(self) -> int:
        """Id of <image>, the placeholder of every image position."""
        return layout_token_ids(self.tokenizer)[IMAGE_PLACEHOLDER]

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return layout_token_ids(self.tokenizer)[PAD]

    @property
    def bos_id(self) -> int | None:
        """Id that starts every text; None without one."""
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        """Id that ends an answer and, of several, is the tokenizer's."""
        return self.tokenizer.eos_id

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer, for generation."""
        return sorted(stop_ids(self.template, self.tokenizer))

    @property
    def copied(self) -> tuple[Path, ...]:
        """Files that are copied; none."""
        return ()

    def files(self, *, max_length: int) -> dict[str, dict[str, Any]]:
        """Return the contents of the tokenizer's files by name; max_length: positions of the model."""
        named = {name: self._config[name] for name in _NAMES if self._config.get(name) is not None}
        return {
            "tokenizer.json": self.tokenizer_json(),
            "tokenizer_config.json": self.tokenizer_config(max_length=max_length),
            "special_tokens_map.json": {**named, "image_token": IMAGE_PLACEHOLDER},
        }

    def tokenizer_json(self) -> dict[str, Any]:
        """Return the content of tokenizer.json: the tokenizer's own, with the missing tokens of the layout."""
        return {**self._content, "added_tokens": [*self._content["added_tokens"], *self._missing()]}

    def tokenizer_config(self, *, max_length: int) -> dict[str, Any]:
        """Return the content of tokenizer_config.json of a llava-hf model, with left padding for generation."""
        tokens = self.tokenizer_json()["added_tokens"]
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._config,
            "model_max_length": max_length,
            "added_tokens_decoder": {str(token["id"]): _without_id(token) for token in tokens},
            "extra_special_tokens": {"image_token": IMAGE_PLACEHOLDER},
            "image_token": IMAGE_PLACEHOLDER,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
        }

    @cached_property
    def _content(self) -> dict[str, Any]:
        return json.loads(self.tokenizer.path.read_bytes())

    @property
    def _config(self) -> dict[str, Any]:
        return {**self.tokenizer.config, **({} if self._has_pad else {"pad_token": PAD})}

    @property
    def _has_pad(self) -> bool:
        return self.tokenizer.pad_id not in (None, self.tokenizer.unk_id)

    def _missing(self) -> list[dict[str, Any]]:
        """Return the entries of <image> and <pad>, as far as the file lacks them."""
        present = {entry["content"] for entry in self._content["added_tokens"]}
        ids = layout_token_ids(self.tokenizer)
        wanted = [name for name in LAYOUT_TOKENS if name not in present and (name != PAD or not self._has_pad)]
        return [{"id": ids[name], "content": name, **_FLAGS} for name in wanted]


def export_hf_tokenizer(tokenizer: HfTokenizer, template: Template, *, vocab_size: int) -> ExportedHfTokenizer:
    """Prepare a tokenizer.json for the export of a model with `vocab_size` rows that is used with `template`.

    Raises DataError when it does not have the template's special tokens; ConversionError when it has more tokens than
    the model has rows.
    """
    check_special_tokens(template, tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"tokenizer {tokenizer.path} cannot be exported: it has {tokenizer.vocab_size} tokens, the model's "
            f"vocabulary is too small: model.language.vocab_size is {vocab_size}. Give the tokenizer.json that the "
            "model was trained with"
        )
    return ExportedHfTokenizer(tokenizer, template)


def layout_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of <image> (see image_token_id) and of padding in the layout llava-hf.

    Padding is the tokenizer's own <pad> or padding token, unless that is the one for unknown text; else the next id.
    """
    image, own = image_token_id(tokenizer), tokenizer.token_id(PAD)
    if own is None and tokenizer.pad_id != tokenizer.unk_id:
        own = tokenizer.pad_id
    added = max(tokenizer.vocab_size, image + 1)
    return {IMAGE_PLACEHOLDER: image, PAD: added if own is None else own}


def _without_id(token: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}
