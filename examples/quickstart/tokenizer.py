"""Tokenizers of the quickstart, trained on the data set's text: sentencepiece like LLaMA's, and byte BPE like Qwen2.5's
and Llama 3's."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers


@dataclass(frozen=True)
class ByteBPE:
    """Properties of a family's tokenizer.json, in small."""

    vocab_size: int
    """Number of tokens, the special ones included."""
    special: tuple[str, ...]
    """Special tokens; their ids follow those of the ordinary ones."""
    eos: str
    pad: str
    bos: str | None = None
    digits: int = 1
    """Largest number of digits in a token."""
    normalizer: str | None = None


FAMILIES = {
    "qwen_2.5": ByteBPE(
        vocab_size=480,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        normalizer="NFC",
    ),
    "llama_3": ByteBPE(
        vocab_size=512,
        special=(
            "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        digits=3,
    ),
}  # fmt: skip
"""By the conversation template of the family."""


def train_tokenizer(texts: Iterable[str], path: Path, *, vocab_size: int) -> None:
    """Train a BPE model with byte fallback, dummy prefix, unk 0, bos 1 and eos 2 like LLaMA's, and write it to `path`.

    `texts` are lines.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,  # the same model on every machine
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def train_byte_bpe(texts: Iterable[str], path: Path, *, family: str) -> None:
    """Train a byte BPE model like a family's, and write it to `path` (tokenizer.json), its roles beside it."""
    kind = FAMILIES[family]
    model = tokenizers.Tokenizer(models.BPE())
    if kind.normalizer:
        model.normalizer = getattr(normalizers, kind.normalizer)()
    words = rf" ?\p{{L}}+|\p{{N}}{{1,{kind.digits}}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=kind.vocab_size - len(kind.special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens(list(kind.special))
    if kind.bos:
        start = (kind.bos, model.token_to_id(kind.bos))
        model.post_processor = processors.TemplateProcessing(single=f"{kind.bos} $A", special_tokens=[start])
    model.save(str(path))
    roles = {"bos_token": kind.bos, "eos_token": kind.eos, "pad_token": kind.pad}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    path.with_name("tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
