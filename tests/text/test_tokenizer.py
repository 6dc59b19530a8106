"""Token ids equal to those of the legacy slow tokenizer in transformers; exact spans; decode inverts encode."""

import pickle
import random
from hashlib import sha256
from pathlib import Path

import pytest
import sentencepiece

from megatron_share4v.errors import DataError
from megatron_share4v.text.tokenizer import Tokenizer

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


def test_each_part_between_specials_gets_its_own_leading_space(tokenizer: Tokenizer):
    assert tokenizer.encode("A cat.</s>USER: What") == [*tokenizer.encode("A cat."), 2, *tokenizer.encode("USER: What")]
    space = tokenizer.encode("\nWhat")[0]
    assert tokenizer.encode("\n")[0] == space and tokenizer.encode("x</s>\n")[-2:] == [space, 13]


def test_ids_are_those_of_transformers_legacy_class(tokenizer: Tokenizer, model_path: Path):
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    theirs = SentencePieceBackend(vocab_file=str(model_path), legacy=True, **special)
    for text in TEXTS + random_texts(300):
        assert tokenizer.encode(text) == theirs.convert_tokens_to_ids(theirs.tokenize(text)), repr(text)


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


def test_decode_returns_the_text(tokenizer: Tokenizer):
    for text in TEXTS + random_texts(300):
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
    assert chatml_tokenizer.decode(ids) == "a user"


def test_pickles(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("A cat.</s>x") == tokenizer.encode("A cat.</s>x") and copy.fingerprint == tokenizer.fingerprint


def test_missing_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.model: cannot be read \(No such file.*give the path"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="directory"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"garbage" * 100])
def test_damaged_file(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        Tokenizer(path)


def test_truncated_file(tmp_path: Path, model_path: Path):
    path = tmp_path / "cut.model"
    path.write_bytes(model_path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.model"):
        Tokenizer(path)


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
        Tokenizer(f"{prefix}.model")


def test_half_a_surrogate_pair(tokenizer: Tokenizer):
    with pytest.raises(DataError, match="character 1"):
        tokenizer.encode("a\ud83d")
