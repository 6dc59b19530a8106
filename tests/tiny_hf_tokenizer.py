"""Small byte-level BPE tokenizers (tokenizer.json) with the settings of Qwen2.5's, Qwen3's and Llama 3's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_WORDS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
"""Added tokens that are no special tokens."""
LLAMA_3_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
PHI_3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
CORPUS = (
    "What is the color of the cat in the image? The cat is black and white, and it sleeps on a red sofa.",
    "You are a helpful assistant. You are Qwen, created by Alibaba Cloud. system user assistant\n\n",
    "Describe the image in detail.\n\n    There are 2 dogs, 13 birds and it's sunny; they're happy!!!\n",
    "日本語のテキスト 中文文本 été naïve Ünïcödé 😀😀",
)


def write_qwen_like(
    directory: Path, *, special: Sequence[str] = QWEN_TOKENS, pieces: int = 500, **config: object
) -> Path:
    """Write tokenizer.json and tokenizer_config.json as of Qwen2.5 Instruct: no bos, <|im_end|> ends a turn."""
    named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    tokenizer = _byte_level(digits=1, normalizer=normalizers.NFC(), pieces=pieces)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in QWEN_WORDS])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    own = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "model_max_length": 32768}
    return _write(directory, tokenizer, {**own, **named, **config})


def write_llama_3_like(directory: Path, *, pieces: int = 500, **config: object) -> Path:
    """Write tokenizer.json and tokenizer_config.json as of Llama 3 Instruct: bos by the post-processor, no pad."""
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = _byte_level(digits=3, normalizer=None, pieces=pieces)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in LLAMA_3_TOKENS])
    bos = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return _write(directory, tokenizer, {**own, **named, **config})


def write_phi_3_like(directory: Path, **config: object) -> Path:
    """Write tokenizer.json and tokenizer_config.json as of Phi-3: sentencepiece's spaces, markers that strip to the
    right.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )  # fmt: skip
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(list(CORPUS[:3]) * 10, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if not entry["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=name != "<|endoftext|>") for name in PHI_3_TOKENS]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    return _write(directory, tokenizer, {**own, **named, **config})


def _byte_level(*, digits: int, normalizer: normalizers.Normalizer | None, pieces: int = 500) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=digits > 1))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    pattern = Regex(_CONTRACTIONS + _LETTERS % digits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _corpus() -> Iterable[str]:
    return [*CORPUS, "\n\n", "\n \n\n", "    x\n\n"] * 10


def _write(directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    added = json.loads(tokenizer.to_str())["added_tokens"]
    decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added}
    content = {**config, "added_tokens_decoder": decoder}
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return directory / "tokenizer.json"
