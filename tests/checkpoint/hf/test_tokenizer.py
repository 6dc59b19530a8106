"""tokenizer.json in the library `tokenizers` gives the ids of text/tokenizer.py; unsupported models are refused."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer

from megatron_share4v.checkpoint.hf.tokenizer import ExportedTokenizer, export_tokenizer
from megatron_share4v.errors import ConversionError, DataError
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import Message, get_template, render_conversation
from megatron_share4v.text.tokenizer_config import (
    LEGACY_RULE,
    PUBLISHED_RULE,
    RULES,
    AddedToken,
    TokenizerRule,
    TokenizerSettings,
)

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers.",
    "USER: What animal is this? ASSISTANT: A cat. It is sleeping on the sofa. "
    "### Human: ## It is looking at a bird, I think.",
    "Short questions have  short answers.   Long ones    do not. aaaa aaaaaa abababab 日本語",
]
TEXTS = [
    "",
    " ",
    "  ",
    "A cat.",
    " A cat",
    "  two  spaces ",
    "\n",
    "\nWhat",
    "a\n\n\tb",
    "日本語 é 😀 x",
    "👩‍👩‍👧",
    "e\u0301",
    "a\0b",
    "▁x ▁",
    "<0x0A>",
    "<0xE6>",
    "</s>",
    "<s>[INST] x",
    "A cat.</s>USER: What",
    "a </s> b",
    "</s></s>x<unk>y<s>",
    "<</s>>",
    "</s",
    "<s",
    "\ufeff\u200b",
    "\r\n",
    "aaaaaaa",
    "ababababa",
    "\u2028",
    "ﬁ",
    "Ａ",
    "ß",
    "İ",
    "אבג",
    "नमस्ते",
    "\U0010ffff",
    "long " * 2000,
]
ALPHABET = [
    "A",
    " cat",
    " ",
    "  ",
    "\n",
    "é",
    "日",
    "😀",
    "</s>",
    "<s>",
    "<unk>",
    "<",
    "s>",
    "###",
    "ASSISTANT",
    ":",
    "0",
    "\u200d",
    "aa",
    "ab",
    "aba",
    "▁",
]


def _train(path: Path, *, corpus: list[str] = CORPUS, **changes: object) -> Path:
    model = io.BytesIO()
    settings = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 10), model_writer=model, **settings | changes
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def _texts(number: int, alphabet: list[str] = ALPHABET) -> list[str]:
    draw = random.Random(0)
    return TEXTS + ["".join(draw.choices(alphabet, k=draw.randrange(25))) for _ in range(number)]


def _fast(tokenizer: ExportedTokenizer) -> FastTokenizer:
    return FastTokenizer.from_str(json.dumps(tokenizer.tokenizer_json()))


def _read_tokenizer(path: Path, *, vocab_size: int | None = None, rule: TokenizerRule = LEGACY_RULE, added=()):
    tokenizer = SentencePieceTokenizer(path, settings=TokenizerSettings(rule=rule, tokens=tuple(added)))
    template = get_template("vicuna_v1")
    return export_tokenizer(tokenizer, template, vocab_size=vocab_size or tokenizer.vocab_size)


def _assert_same(path: Path, texts: list[str], *, rule: TokenizerRule = LEGACY_RULE, added=()) -> None:
    megatron = SentencePieceTokenizer(path, settings=TokenizerSettings(rule=rule, tokens=tuple(added)))
    hf_weights = _fast(_read_tokenizer(path, rule=rule, added=added))
    for text in texts:
        ids = megatron.encode(text)
        assert hf_weights.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert hf_weights.encode(text).ids == [megatron.bos_id, *ids]
        if not added:  # after an added token, tokenizers shows the leading space that its encoding added
            assert hf_weights.decode(ids, skip_special_tokens=True) == megatron.decode(ids), repr(text)


def test_ids_and_decoded_texts_are_ours(model_path: Path):
    _assert_same(model_path, _texts(500))


SEG, BOX = AddedToken("[SEG]", 420), AddedToken("<box>", 421, lstrip=True, rstrip=True, special=True)


@pytest.mark.parametrize("added", [(), (SEG, BOX)])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_after_special_tokens(model_path: Path, rule: TokenizerRule, added):
    """transformers-4.31 after a special token: only what a template writes; a leading <s> is that of the prompt."""
    alphabet = [*ALPHABET, "[SEG]", "<box>"]
    texts = [text for text in _texts(500, alphabet) if not text.startswith("<s>")]
    if rule == PUBLISHED_RULE:
        cut = ("</s>", "<s>", "<unk>", "[SEG]", "<box>")
        texts = [text for text in texts if not any(token in text for token in cut)]
    turns = [
        Message("human", "What?"),
        Message("gpt", "A cat."),
        Message("human", " How many?"),
        Message("gpt", "Two."),
    ]
    for name in ("vicuna_v1", "share4v_v1"):
        texts.append(render_conversation(get_template(name), turns, has_image=False).text)
    texts += ["x</s>USER: A cat", "x</s>USER: ", "x</s>", "</s></s>", "USER: </s>USER: \nWhat</s>USER:  a</s> b"]
    _assert_same(model_path, texts, rule=rule, added=added)


def test_the_start_follows_bos_and_the_image(model_path: Path):
    """Text after the prompt's <s> and after an image has the leading space under every rule."""
    for rule in RULES:
        megatron = SentencePieceTokenizer(model_path, settings=TokenizerSettings(rule=rule))
        fast = _fast(_read_tokenizer(model_path, rule=rule))
        ids = fast.encode("<s>A chat USER: <image>\nWhat</s>USER: A cat", add_special_tokens=False).ids
        expected = [1, *megatron.encode("A chat USER: "), 420, *megatron.encode("\nWhat</s>USER: A cat")]
        assert ids == expected, rule


def test_merges_that_overlap_are_done_in_sentencepieces_order(tmp_path: Path):
    draw = random.Random(1)
    corpus = ["".join(draw.choices("ab ", k=60)) for _ in range(100)]
    path = _train(tmp_path / "tokenizer.model", corpus=corpus, vocab_size=500)
    _assert_same(path, _texts(1000, ["a", "b", "aaaa", "bbb", "abab", "aba", " ", "   "]))


def test_without_byte_fallback_unknown_runs_are_one_unk(tmp_path: Path):
    path = _train(tmp_path / "tokenizer.model", byte_fallback=False, vocab_size=150)
    megatron = SentencePieceTokenizer(path)
    hf_weights = _fast(_read_tokenizer(path, vocab_size=megatron.vocab_size))
    for text in ("A cat.", "A 😀😀 cat", "😀", "é x é"):
        assert hf_weights.encode(text, add_special_tokens=False).ids == megatron.encode(text), text


def test_control_pieces_are_cut_out(tmp_path: Path):
    path = _train(tmp_path / "tokenizer.model", control_symbols=["<|im_start|>", "<|im_end|>"])
    _assert_same(path, ["<|im_start|>user\nA cat<|im_end|>", " <|im_end|> ", "<|im_end|><|im_start|>", "<|im_end"])


def test_image_and_pad_come_after_the_last_token(model_path: Path):
    """In a model with more rows than tokens they are in the spare rows."""
    own = SentencePieceTokenizer(model_path)
    pieces = own.vocab_size
    tokenizer = _read_tokenizer(model_path, vocab_size=pieces + 5)
    fast = _fast(tokenizer)
    assert (tokenizer.image_id, tokenizer.pad_id) == (pieces, pieces + 1)
    ids = [*own.encode("A"), pieces, *own.encode("\nB"), pieces + 1]
    assert fast.encode("A<image>\nB<pad>", add_special_tokens=False).ids == ids
    assert fast.get_vocab_size() == pieces + 2


def test_configuration_says_what_old_and_new_readers_look_for(model_path: Path):
    tokenizer = _read_tokenizer(model_path)
    config = tokenizer.tokenizer_config(max_length=4096)
    assert (config["legacy"], config["add_bos_token"], config["padding_side"], config["pad_token"]) == (
        True,
        True,
        "left",
        "<pad>",
    )
    assert config["extra_special_tokens"] == {"image_token": "<image>"}
    assert {i: token["content"] for i, token in config["added_tokens_decoder"].items()} == {
        "0": "<unk>",
        "1": "<s>",
        "2": "</s>",
        str(tokenizer.image_id): "<image>",
        str(tokenizer.pad_id): "<pad>",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 330}, "type UNIGRAM"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes the text before tokenizing"),
        ({"remove_extra_whitespaces": True}, "changes the text before tokenizing"),
        ({"treat_whitespace_as_suffix": True}, "changes the text before tokenizing"),
        ({"add_dummy_prefix": False}, "no leading space"),
        ({"user_defined_symbols": ["<sep>"]}, "1 pieces are user_defined ('<sep>')"),
        ({"control_symbols": ["<pad>"]}, "a piece <pad> already"),
        ({"vocab_size": 430}, "430 pieces, the model's vocabulary is too small: model.language.vocab_size is 420"),
    ],
)
def test_models_that_cannot_be_repeated_are_refused(tmp_path: Path, changes: dict, message: str):
    path = _train(tmp_path / "tokenizer.model", **changes)
    with pytest.raises(ConversionError) as caught:
        _read_tokenizer(path, vocab_size=420)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="absent.model"):
        _read_tokenizer(tmp_path / "absent.model", vocab_size=420)
