"""Worked example with the token ids of LLaMA, under the three rules for text after a special token.

The expected ids were computed with LLaMA's vocabulary and the official code under transformers 4.31 and 4.37. The
published models have `legacy: false` under 4.31: "US" "ER" after </s>, 3308 1001. No dependency ships LLaMA's
vocabulary, so these tests build a model with the pieces of the example at their published ids.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from megatron_share4v.text.mask import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_conversation, encode_prompt
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import Message, get_template
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import RULES, TokenizerRule, TokenizerSettings

VOCABULARY = 32000
PIECES = (
    "319 ▁A|13563 ▁chat|1546 ▁between|263 ▁a|12758 ▁curious|1404 ▁user|322 ▁and|385 ▁an|23116 ▁artificial|21082 "
    "▁intelligence|20255 ▁assistant|"
    "29889 .|450 ▁The|4076 ▁gives|8444 ▁helpful|29892 ,|13173 ▁detailed|1248 ▁pol|568 ite|6089 ▁answers|304 ▁to|278 "
    "▁the|29915 '|29879 s|"
    "5155 ▁questions|3148 ▁US|3308 US|11889 USER|1001 ER|29901 :|29871 ▁|5618 What|13019 ▁animal|338 ▁is|445 ▁this|"
    "29973 ?|1799 SS|9047 "
    "IST|13566 ANT|6635 ▁cat|"
    "1724 ▁What|372 ▁it|2599 ▁doing|739 ▁It|8709 ▁sleep|292 ing|12844 ▁sle|8961 eps"
)
SYSTEM = (
    "319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 322 1248 568 "
    "6089 304 278 1404 29915 29879 "
    "5155 29889"
)
AFTER_END = {  # "USER" after </s>
    "legacy": "3148 1001",
    "transformers-4.31": "3308 1001",
    "transformers-4.34": "11889",
}
SEGMENTS = (  # ids, trained; of the published rule
    ("1", False),
    (SYSTEM, False),
    ("3148 1001 29901 29871", False),
    ("-200", False),
    ("29871 13 5618 13019 338 445 29973", False),
    ("319 1799 9047 13566 29901", False),
    ("319 6635 29889 2", True),
    ("3308 1001 29901 1724 338 372 2599 29973", False),
    ("319 1799 9047 13566 29901", False),
    ("739 338 8709 292 29889 2", True),
)
TURNS = (
    Message("human", "What animal is this?\n<image>"),
    Message("gpt", "A cat."),
    Message("human", "What is it doing?"),
    Message("gpt", "It is sleeping."),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    known = {int(number): piece for number, piece in (entry.split(" ") for entry in PIECES.split("|"))}
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    for i in range(VOCABULARY):
        if i < 3:
            model.pieces.add(
                piece=("<unk>", "<s>", "</s>")[i], score=0, type=kinds.UNKNOWN if i == 0 else kinds.CONTROL
            )
        elif i < 259:
            model.pieces.add(piece=f"<0x{i - 3:02X}>", score=0, type=kinds.BYTE)
        elif i in known:
            # "sleeps" can also be "sleep" and "s", "▁USER" also "▁" and "USER"; the scores set the merge order.
            score = {"▁sle": -0.5, "eps": -0.5, "USER": -1.5}.get(known[i], -1)
            model.pieces.add(piece=known[i], score=score, type=kinds.NORMAL)
        else:
            model.pieces.add(piece=f"<unused{i}>", score=0, type=kinds.UNUSED)
    path: Path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return SentencePieceTokenizer(path)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


@pytest.mark.parametrize("rule", RULES)
def test_three_rules_after_the_end_of_an_answer(llama: Tokenizer, rule: TokenizerRule):
    ruled = SentencePieceTokenizer(llama.path, settings=TokenizerSettings(rule=rule))
    expected = [i for segment, _ in SEGMENTS for i in numbers(segment.replace("3308 1001", AFTER_END[rule]))]
    encoded = encode_conversation(ruled, get_template("vicuna_v1"), TURNS, has_image=True, max_length=2048)
    assert list(encoded.input_ids) == expected
    trained = [i for i in encoded.labels if i != IGNORE_INDEX]
    assert trained == [i for segment, kept in SEGMENTS if kept for i in numbers(segment)]
    assert ruled.encode("</s>\nWhat")[1:] == ([29871, 13, 5618] if rule == "legacy" else [13, 5618])
    assert ruled.encode("</s> What")[1:] == ([1724] if rule == "transformers-4.34" else [29871, 1724])


def test_the_published_rule_is_the_default(llama: Tokenizer):
    assert llama.rule == "transformers-4.31"


def test_two_rounds_with_an_image(llama: Tokenizer):
    encoded = encode_conversation(llama, get_template("vicuna_v1"), TURNS, has_image=True, max_length=2048)
    ids, labels = [], []
    for segment, trained in SEGMENTS:
        ids += numbers(segment)
        labels += numbers(segment) if trained else [IGNORE_INDEX] * len(numbers(segment))
    assert list(encoded.input_ids) == ids and list(encoded.labels) == labels
    assert len(ids) == 71 and ids.index(IMAGE_TOKEN_INDEX) == 35
    assert [n for n, label in enumerate(labels) if label != IGNORE_INDEX] == [*range(48, 52), *range(65, 71)]


def test_prompt_of_the_second_round(llama: Tokenizer):
    prompt = encode_prompt(llama, get_template("vicuna_v1"), TURNS[:3], has_image=True)
    assert prompt == [i for segment, _ in SEGMENTS[:-1] for i in numbers(segment)]


def test_caption(llama: Tokenizer):
    turns = [Message("human", "<image>\nDescribe the image."), Message("gpt", "A cat sleeps.")]
    encoded = encode_conversation(llama, get_template("plain"), turns, has_image=True, max_length=2048)
    assert encoded.input_ids == (1, -200, 319, 6635, 12844, 8961, 29889, 13)
    assert encoded.labels == (-100, -100, 319, 6635, 12844, 8961, 29889, 13)


def test_an_image_at_the_start_and_a_text_after_it(llama: Tokenizer):
    assert llama.encode("</s>USER:") == [2, 3308, 1001, 29901]
    assert llama.encode("USER:") == [3148, 1001, 29901]
    assert llama.encode("\nWhat") == [29871, 13, 5618]
