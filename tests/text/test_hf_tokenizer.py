"""Ids, texts and spans of tokenizer.json compared with transformers' PreTrainedTokenizerFast."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_hf_tokenizer import QWEN_TOKENS, QWEN_WORDS, write_llama_3_like, write_phi_3_like, write_qwen_like
from transformers import PreTrainedTokenizerFast

from megatron_share4v.errors import DataError
from megatron_share4v.text.detokenizer import IncrementalDetokenizer
from megatron_share4v.text.hf_tokenizer import HfTokenizer
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.tokenizer import Tokenizer, image_token_id

WRITERS = {"qwen": write_qwen_like, "llama_3": write_llama_3_like, "phi_3": write_phi_3_like}
WORDS = [
    "A", "cat", " is", " the", "image", ".", "?", "\n", "\n\n", " ", "  ", "        ", "\t", "é", "e\u0301", "日本語",
    "中", "😀", "👩‍👩‍👧", "\0", "\x07", "\u200b", "\u2028", "\u3000", "\r\n", "12345", "it's", "'LL", "\ufb01", "Å",
    "\U0010ffff", "<", "|>", "<|im_end|>", "<|im_start|>", "<|im_", "<|eot_id|>", "<|begin_of_text|>", "<|endoftext|>",
    "<tool_call>", "<|end|>", "<s>", "</s>", "<|IM_END|>", "▁", "<0x0A>",
]  # fmt: skip


def random_texts(number: int) -> list[str]:
    draw = random.Random(7)
    return [draw.choice(["", " ", ""]).join(draw.choices(WORDS, k=draw.randrange(12))) for _ in range(number)]


@pytest.fixture(scope="module", params=sorted(WRITERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def own(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def reference(path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(path.parent)


def test_ids_and_decoded_texts_are_those_of_transformers(own: Tokenizer, reference: PreTrainedTokenizerFast):
    for text in random_texts(3000):
        ids = own.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), repr(text)
        for skip in (True, False):
            decoded = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert own.decode(ids, skip_special=skip) == decoded, repr(text)
    assert [*own.bos_ids, *own.encode("A cat")] == reference.encode("A cat")


def test_spans_cover_the_text_in_order(own: Tokenizer):
    for text in random_texts(1000):
        ids, spans = own.encode_with_offsets(text)
        assert len(ids) == len(spans)
        covered = {place for start, stop in spans for place in range(start, stop)}
        assert covered == set(range(len(text))), (text, spans)
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)


def test_incremental_text_is_the_whole_text(own: Tokenizer):
    for text in random_texts(300):
        ids = own.encode(text)
        stream = IncrementalDetokenizer(own)
        parts = [stream.feed([i]) for i in ids]
        assert "".join(parts) + stream.finish() == own.decode(ids)
        assert not any("\ufffd" in part for part in parts)


def test_token_bytes_add_up_to_the_text(own: Tokenizer):
    for text in random_texts(300):
        ids = own.encode(text)
        written = b"".join(own.token_bytes(i) for i in ids).decode()
        decoded = own.decode(ids, skip_special=False)
        assert written in (decoded, f" {decoded}")
        assert len(written) <= max(1, len(ids)) * own.max_piece_length


def test_a_continuation_has_no_space_of_its_own(own: Tokenizer):
    for first, rest in (("cat", "cat"), ("A", " the image"), ("x", "日本")):
        ids = [*own.encode(first), *own.encode_continuation(rest)]
        assert own.decode(ids) == first + rest


def test_special_ids(tmp_path: Path):
    qwen = load_tokenizer(write_qwen_like(tmp_path / "qwen"))
    assert (qwen.bos_id, qwen.bos_ids, qwen.unk_id) == (None, [], None)
    assert qwen.eos_id == qwen.token_id("<|im_end|>") and qwen.pad_id == qwen.token_id("<|endoftext|>")
    assert qwen.special_pieces == {*QWEN_TOKENS} and len(qwen.added) == len(QWEN_TOKENS) + len(QWEN_WORDS)
    assert qwen.pieces == qwen.added[0].id and qwen.vocab_size == qwen.pieces + len(qwen.added)
    assert qwen.rule is None and qwen.token_id("no such token") is None and qwen.class_name == "Qwen2Tokenizer"
    llama = load_tokenizer(write_llama_3_like(tmp_path / "llama"))
    assert llama.bos_ids == [llama.token_id("<|begin_of_text|>")] and llama.pad_id is None
    assert "at the start" in llama.summary() and "no token" in qwen.summary()
    # <s> is named, but not added to a text.
    phi = load_tokenizer(write_phi_3_like(tmp_path / "phi"))
    assert phi.bos_ids == [] and phi.unk_id == 0
    assert load_tokenizer(write_phi_3_like(tmp_path / "with", add_bos_token=True)).bos_ids == [1]


def test_the_image_id_is_found_by_name_or_is_the_next_one(tmp_path: Path):
    plain = load_tokenizer(write_qwen_like(tmp_path / "plain"))
    assert image_token_id(plain) == plain.vocab_size  # the model's rows do not count
    assert image_token_id(plain, reuse="<|image_pad|>") == plain.token_id("<|image_pad|>")
    with pytest.raises(DataError, match=r"has no token '<img>', which is named for image positions"):
        image_token_id(plain, reuse="<img>")
    inside = load_tokenizer(write_qwen_like(tmp_path / "inside", special=("<|im_end|>", "<image>", "<|endoftext|>")))
    assert image_token_id(inside) == image_token_id(inside, reuse="<|im_end|>") == inside.eos_id + 1
    assert inside.decode(inside.encode("an <image>")) == "an <image>"
    assert image_token_id(inside) not in inside.encode("an <image>") and "<image>" not in inside.special_pieces


def test_added_image_and_pad_at_the_end_do_not_change_the_tokenizer(tmp_path: Path):
    path = write_llama_3_like(tmp_path / "before")
    plain, content = load_tokenizer(path), json.loads(path.read_text(encoding="utf-8"))
    for number, name in enumerate(("<image>", "<pad>")):
        entry = {**content["added_tokens"][-1], "content": name, "id": plain.vocab_size + number}
        content["added_tokens"].append(entry)
    after = write_llama_3_like(tmp_path / "after", pad_token="<pad>", image_token="<image>")
    after.write_text(json.dumps(content), encoding="utf-8")
    exported = load_tokenizer(after)
    assert exported.fingerprint == plain.fingerprint and exported.vocab_size == plain.vocab_size
    assert exported.encode("<image> <pad>") == plain.encode("<image> <pad>") and exported.pad_id is None
    assert image_token_id(exported) == image_token_id(plain) == plain.vocab_size


def test_fingerprint_covers_vocabulary_and_start(tmp_path: Path):
    own = load_tokenizer(write_llama_3_like(tmp_path / "a"))
    assert load_tokenizer(write_llama_3_like(tmp_path / "b")).fingerprint == own.fingerprint
    assert load_tokenizer(write_llama_3_like(tmp_path / "c", add_bos_token=False)).fingerprint != own.fingerprint
    assert load_tokenizer(write_qwen_like(tmp_path / "d")).fingerprint != own.fingerprint


def test_files_of_a_checkpoint_give_an_equal_tokenizer(own: Tokenizer, tmp_path: Path):
    for name, content in own.files().items():
        (tmp_path / name).write_bytes(content)
    stored = load_tokenizer(tmp_path / own.file_name)
    assert stored.fingerprint == own.fingerprint
    assert (stored.bos_id, stored.eos_id, stored.pad_id) == (own.bos_id, own.eos_id, own.pad_id)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_pickles(own: Tokenizer):
    copy = pickle.loads(pickle.dumps(own))
    assert copy.encode("A cat 😀<|im_end|>") == own.encode("A cat 😀<|im_end|>")


def test_rule_is_refused(path: Path):
    with pytest.raises(DataError, match="rule legacy is for a sentencepiece tokenizer.model"):
        load_tokenizer(path, rule="legacy")


def test_half_a_surrogate_pair(own: Tokenizer):
    with pytest.raises(DataError, match="half a surrogate pair"):
        own.encode("a\ud800")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: {"a": 1}, "has no model with a vocabulary"),
        (lambda content: {**content, "model": {**content["model"], "type": "No"}}, "cannot read it"),
        (
            lambda content: {**content, "added_tokens": content["added_tokens"][1:]},
            r"tokenizer_config.json beside it has the added token|but gets|is no token of the file",
        ),
        (
            lambda content: {**content, "added_tokens": [{**t, "id": t["id"] + 5} for t in content["added_tokens"]]},
            "without a gap",
        ),
        (lambda content: {**content, "added_tokens": {"a": 1}}, r"added_tokens has \{'a': 1\}, which is not"),
        (lambda content: {**content, "added_tokens": ["a"]}, "added_tokens has 'a', which is not an added token"),
        (lambda content: {**content, "added_tokens": [{"content": "a"}]}, "with its content and id"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Callable, message: str):
    path = write_qwen_like(tmp_path)
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": 5}, "eos_token in tokenizer_config.json beside it is 5, not the name of a token"),
        ({"pad_token": ["a"]}, r"pad_token in .* is \['a'\]"),
        ({"eos_token": "</s>"}, "is no token of the file"),
        ({"added_tokens_decoder": [1]}, "not an object of added tokens by id"),
        ({"added_tokens_decoder": {"1": "a"}}, "not an object of added tokens by id"),
        ({"added_tokens_decoder": {"1": {"content": "<|im_end|>"}}}, r"token '<\|im_end\|>' with id 1, which the file"),
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, changes: dict[str, object], message: str):
    path = write_qwen_like(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_tokenizer(path)


def test_what_is_no_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"is a directory; no tokenizer.model or tokenizer.json in it"):
        load_tokenizer(tmp_path)
    path = write_qwen_like(tmp_path)
    with pytest.raises(DataError, match=f"is a directory; give the path of its tokenizer file, {path}"):
        load_tokenizer(tmp_path)
    for content in ("", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"tokenizer.json: is no JSON .*a Git LFS pointer is not the file"):
            load_tokenizer(path)


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    path = write_qwen_like(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no eos_token is stated"):
        HfTokenizer(path)
