"""Token ids equal those of the slow tokenizer in transformers under each rule; exact spans; decode inverts encode."""

import json
import pickle
import random
from hashlib import sha256
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_share4v.errors import DataError
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import (
    RULES,
    AddedToken,
    TokenizerRule,
    TokenizerSettings,
    read_tokenizer_settings,
)

TEXTS = [
    "",
    " ",
    "A cat.",
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
    "</s>",
    "<s>[INST] x",
    "A cat.</s>USER: What",
    "a </s> b",
    "</s></s>x<unk>y<s>",
    "<</s>>",
    "</s",
    "<image>\nWhat?",
    "\ufeff\u200b",
    "\r\n",
]


def random_texts(number: int) -> list[str]:
    draw = random.Random(0)
    alphabet = [
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
        "<",
        "s>",
        "###",
        "ASSISTANT",
        ":",
        "0",
        "\u200d",
    ]
    return ["".join(draw.choices(alphabet, k=draw.randrange(12))) for _ in range(number)]


def test_special_ids(tokenizer: Tokenizer, model_path: Path):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 600
    assert tokenizer.fingerprint == sha256(model_path.read_bytes()).hexdigest()


def under(rule: TokenizerRule, path: Path, *added: AddedToken) -> Tokenizer:
    return SentencePieceTokenizer(path, settings=TokenizerSettings(rule=rule, tokens=added))


def test_legacy_parts_between_specials_get_their_own_leading_space(model_path: Path):
    tokenizer = under("legacy", model_path)
    assert tokenizer.encode("A cat.</s>USER: What") == [*tokenizer.encode("A cat."), 2, *tokenizer.encode("USER: What")]
    space = tokenizer.encode("\nWhat")[0]
    assert tokenizer.encode("\n")[0] == space and tokenizer.encode("x</s>\n")[-2:] == [space, 13]


def test_ids_are_those_of_transformers_legacy_class(model_path: Path):
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    tokenizer = under("legacy", model_path)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    reference = SentencePieceBackend(vocab_file=str(model_path), legacy=True, **special)
    for text in TEXTS + random_texts(300):
        assert tokenizer.encode(text) == reference.convert_tokens_to_ids(reference.tokenize(text)), repr(text)


def test_the_first_token_after_a_special_one_loses_its_space_in_4_31(model_path: Path):
    """Ids as computed by transformers 4.31.0 with `legacy: false`, from the pieces with the leading space."""
    tokenizer, model = under("transformers-4.31", model_path), sentencepiece.SentencePieceProcessor(str(model_path))
    for text in TEXTS + random_texts(300):
        first, *others = text.replace("▁", " ").split("</s>")
        expected = model.encode(first)
        if "<s>" in text or "<unk>" in text:
            continue
        for part in others:
            pieces = model.encode(part, out_type=str)
            if part and not part.startswith(" "):
                pieces = [piece for piece in (pieces[0][1:], *pieces[1:]) if piece]
            expected += [2, *map(model.piece_to_id, pieces)]
        if 0 not in expected:  # 4.31 gives <unk> where the vocabulary lacks the piece
            assert tokenizer.encode(text) == expected, repr(text)
    assert tokenizer.encode("a</s>Jx") == [
        *tokenizer.encode("a"),
        2,
        *tokenizer.encode("</s>J")[1:],
        *model.encode("ax")[-1:],
    ]
    assert 0 not in tokenizer.encode("</s>questions</s>polite")


def test_text_after_a_special_token_has_no_space_in_4_34(model_path: Path):
    """Ids as computed by transformers 4.34.0 and 4.37.2 with `legacy: false`: by a model without the leading space."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = under("transformers-4.34", model_path)
    for text in TEXTS + random_texts(300):
        if "<s>" in text or "<unk>" in text:
            continue
        first, *others = text.split("</s>")
        expected = model.encode("▁" + first) if first else []
        for part in others:
            expected += [2, *model.encode(part)]
        assert tokenizer.encode(text) == expected, repr(text)


def test_settings_are_read_beside_the_model(tmp_path: Path, model_path: Path):
    path, config = tmp_path / "tokenizer.model", tmp_path / "tokenizer_config.json"
    path.write_bytes(model_path.read_bytes())
    assert (SentencePieceTokenizer(path).rule, SentencePieceTokenizer(path).settings.stated) == (
        "transformers-4.31",
        False,
    )
    assert read_tokenizer_settings(path, default="legacy").rule == "legacy"
    for content, rule in (
        ({"legacy": False}, "transformers-4.31"),
        ({"legacy": True}, "legacy"),
        ({}, "legacy"),
        ({"legacy": False, "tokenizer_rule": "transformers-4.34"}, "transformers-4.34"),
    ):
        config.write_text(json.dumps(content))
        assert (SentencePieceTokenizer(path).rule, SentencePieceTokenizer(path).settings.stated) == (rule, True)
        assert read_tokenizer_settings(path, rule="transformers-4.34").rule == "transformers-4.34"
    for content, message in (
        ({"legacy": "no"}, "legacy is 'no'"),
        ({"tokenizer_rule": "4.31"}, "is '4.31'; it is one"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            SentencePieceTokenizer(path)
    config.write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json: cannot be read"):
        SentencePieceTokenizer(path)


def test_added_tokens(tmp_path: Path, model_path: Path):
    """A token of added_tokens.json alone takes the whitespace around it, as in transformers 4.31."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_path.read_bytes())
    plain = SentencePieceTokenizer(path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[SEG]": 600, "<box>": 601, "<image>": 602, "<pad>": 603}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": [{"content": "<box>", "lstrip": False, "rstrip": False}]})
    )
    tokenizer = SentencePieceTokenizer(path)
    assert [(token.text, token.lstrip, token.special) for token in tokenizer.added] == [
        ("[SEG]", True, False),
        ("<box>", False, True),
    ]
    assert tokenizer.vocab_size == 602 and tokenizer.fingerprint != plain.fingerprint
    assert tokenizer.encode("A cat [SEG] . <box>") == [
        *plain.encode("A cat"),
        600,
        *plain.encode("</s>.")[1:],
        *plain.encode(" ")[-1:],
        601,
    ]
    ids, spans = tokenizer.encode_with_offsets("a \n[SEG] [SEG]<image>")
    assert ids[1:3] == [600, 600] and spans[1:3] == [(1, 9), (9, 14)]
    assert tokenizer.decode([*plain.encode("It is"), 600, 601, 2]) == "It is[SEG]"
    assert tokenizer.token_bytes(600) == b"[SEG]"
    assert pickle.loads(pickle.dumps(tokenizer)).encode("[SEG]") == [600]
    assert len(tokenizer.encode(" " * 100_000 + "x")) > 100  # linear in the length of a run of spaces


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"[SEG]": 601}, "next free one is 600"),
        ({"[SEG]": 599}, "is the piece"),
        ({"[SEG]": 600, " ": 601}, "is blank"),
        ({"[SEG]": "x"}, "cannot be read"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(tmp_path: Path, model_path: Path, tokens: dict, message: str):
    (tmp_path / "tokenizer.model").write_bytes(model_path.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    with pytest.raises(DataError, match=message):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")


def test_spans_cover_the_text_in_order(tokenizer: Tokenizer):
    for text in TEXTS + random_texts(300):
        ids, spans = tokenizer.encode_with_offsets(text)
        assert len(ids) == len(spans)
        covered = 0
        for begin, end in spans:
            assert begin == covered and end >= begin
            covered = end
        assert covered == len(text)


def test_a_span_is_the_text_of_its_token(tokenizer: Tokenizer):
    text = "USER: 日 What animal?</s>A cat."
    ids, spans = tokenizer.encode_with_offsets(text)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    for i, (begin, end) in zip(ids, spans):
        piece = model.id_to_piece(i)
        if not model.is_byte(i):
            assert text[begin:end] in (piece.replace("▁", " "), piece.removeprefix("▁"))
    assert [text[b:e] for i, (b, e) in zip(ids, spans) if model.is_byte(i)] == ["", "", "日"]


@pytest.mark.parametrize("rule", RULES)
def test_decode_returns_the_text(model_path: Path, rule: TokenizerRule):
    tokenizer = under(rule, model_path)
    for text in TEXTS + random_texts(300):
        if rule == "transformers-4.34" and text.startswith("<s>"):
            continue  # decoded as the <s> of a prompt, after which 4.34 writes a space
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text.replace("▁", " ")
    assert tokenizer.decode([1, *tokenizer.encode("A cat."), 2, 0]) == "A cat."
    assert tokenizer.decode([]) == ""


def test_decode_of_half_a_character_is_marked_and_does_not_raise(tokenizer: Tokenizer):
    ids = tokenizer.encode("cat 😀")
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert texts[-1] == "cat 😀" and texts[-5] == "cat "
    assert all(text.startswith("cat ") and text.endswith("\ufffd") for text in texts[-4:-1])


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer):
    with pytest.raises(AssertionError, match="-200"):
        tokenizer.decode([5, -200])
    with pytest.raises(AssertionError, match="600"):
        tokenizer.decode([600])


def test_control_symbols_of_the_model_are_special(chatml_tokenizer: Tokenizer):
    ids, spans = chatml_tokenizer.encode_with_offsets("a<|im_end|><|im_start|>user")
    assert (1, 11) in spans and (11, 23) in spans
    assert chatml_tokenizer.decode(ids) == "auser"
    assert (
        under("legacy", chatml_tokenizer.path).decode(under("legacy", chatml_tokenizer.path).encode("a<|im_end|>b"))
        == "a b"
    )


def test_pickles(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("A cat.</s>x") == tokenizer.encode("A cat.</s>x") and copy.fingerprint == tokenizer.fingerprint


def test_missing_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.model: cannot be read \(No such file.*give the path"):
        SentencePieceTokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="directory"):
        SentencePieceTokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"garbage" * 100])
def test_damaged_file(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        SentencePieceTokenizer(path)


def test_truncated_file(tmp_path: Path, model_path: Path):
    path = tmp_path / "cut.model"
    path.write_bytes(model_path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.model"):
        SentencePieceTokenizer(path)


def test_model_without_bos(tmp_path: Path):
    prefix = str(tmp_path / "nobos")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 5),
        model_prefix=prefix,
        vocab_size=20,
        model_type="bpe",
        bos_id=-1,
        eos_id=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DataError, match="no <s>"):
        SentencePieceTokenizer(f"{prefix}.model")


def test_half_a_surrogate_pair(tokenizer: Tokenizer):
    with pytest.raises(DataError, match="character 1"):
        tokenizer.encode("a\ud83d")
