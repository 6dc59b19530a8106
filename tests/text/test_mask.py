"""Ids and labels compared with a second implementation, written from the description of the official procedure.

That procedure renders the text, splits it at separators, tokenises the parts again and counts tokens. Further tests
cover each quirk, truncation, prompts and each error.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest
import sentencepiece

from megatron_share4v.errors import DataError
from megatron_share4v.text.mask import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    EncodedConversation,
    encode_conversation,
    encode_prompt,
)
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import Message, get_template
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import TokenizerRule, TokenizerSettings

TWO = ("vicuna_v1", "share4v_v1", "v1_mmtag")
LLAMA_2 = ("llama_2", "share4v_llama_2", "mistral_instruct")
MPT = ("mpt", "chatml_direct")
V0 = ("vicuna_v0", "share4v_v0", "v0_mmtag")
Counted = tuple[list[int], list[int]]


class Counting:
    """Official procedure: split at special tokens, encode each part by the tokenizer rule, <s> first."""

    def __init__(self, tokenizer: Tokenizer, specials: Sequence[str] = ("<s>", "</s>", "<unk>")) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
        self.specials, self.rule = specials, tokenizer.rule

    def ids(self, text: str) -> list[int]:
        found = [1]
        marked = "▁" + text.replace("▁", " ")  # marks the start, as transformers does
        for part in re.split("|".join(f"({re.escape(special)})" for special in self.specials), marked):
            if part:
                found += [self.model.piece_to_id(part)] if part in self.specials else self.part(part)
        return found

    def part(self, part: str) -> list[int]:
        pieces = self.model.encode(part.removeprefix("▁"), out_type=str)
        if self.rule == "transformers-4.31" and part[0] not in "▁ ":
            pieces = [piece for piece in (pieces[0].removeprefix("▁"), *pieces[1:]) if piece]
        return [self.model.piece_to_id(piece) for piece in pieces]

    def image_ids(self, text: str, has_image: bool) -> list[int]:
        if not has_image:
            return self.ids(text)
        first, *others = [self.ids(chunk) for chunk in text.split("<image>")]
        return first + [i for chunk in others for i in [IMAGE_TOKEN_INDEX, *chunk[1:]]]

    def by_rounds(
        self, text: str, rounds: list[str], answers: list[str], mark: str, has_image: bool, tail: int
    ) -> Counted:
        """Count round by round; the <s> of each round counts for the separator removed by the split.

        tail: trained tokens at the end of the mark. Raises ValueError or AssertionError when the split finds no answers
        or different ones.
        """
        ids = self.image_ids(text, has_image)
        labels = list(ids)
        at = 1
        labels[:at] = [IGNORE_INDEX] * at
        for one, answer in zip(rounds, answers):
            question, found = one.split(mark)
            assert found == answer
            masked = len(self.image_ids(question + mark, has_image)) - 1 - tail
            labels[at : at + masked] = [IGNORE_INDEX] * masked
            at += len(self.image_ids(one, has_image))
        assert at == len(ids), "tokenization mismatch"
        return ids, labels

    def plain(self, caption: str) -> Counted:
        ids = self.image_ids(f"<image>{caption}\n", True)
        masked = len(self.image_ids("<image>", True))
        return ids, [IGNORE_INDEX] * masked + ids[masked:]

    def v0(self, system: str, texts: list[str], has_image: bool) -> Counted:
        header = f"{system}\n\n"
        parts = [f"### {('Human', 'Assistant')[n % 2]}: {text}\n" for n, text in enumerate(texts)]
        ids = self.image_ids(header + "".join(parts) + "### ", has_image)
        labels = list(ids)
        at = len(self.image_ids(header, has_image))
        labels[:at] = [IGNORE_INDEX] * at
        for n, part in enumerate(parts):
            length = len(self.image_ids(part, has_image))
            if n % 2 == 0:
                labels[at + 2 : at + length] = [IGNORE_INDEX] * (length - 2)
            at += length
        return ids, labels

    def two(self, system: str, texts: list[str], has_image: bool) -> Counted:
        text = f"{system} "
        for n, one in enumerate(texts):
            text += f"ASSISTANT: {one}</s>" if n % 2 else f"USER: {one} "
        return self.by_rounds(text, text.split("</s>"), texts[1::2], " ASSISTANT: ", has_image, tail=1)

    def llama_2(self, system: str, texts: list[str], has_image: bool, start: str = "<s>") -> Counted:
        text = ""
        for n, one in enumerate(texts):
            if n == 0 and system:
                one = f"<<SYS>>\n{system}\n<</SYS>>\n\n{one}"
            text += f" {one} </s>" if n % 2 else f"{start}[INST] {one} [/INST]"
        text = text.removeprefix(start)
        return self.by_rounds(
            text, text.split("</s>"), [f"{one} " for one in texts[1::2]], "[/INST] ", has_image, tail=1
        )

    def mpt(self, system: str, texts: list[str], has_image: bool) -> Counted:
        end = "<|im_end|>"
        text = f"<|im_start|>system\n{system}{end}"
        for n, one in enumerate(texts):
            text += f"<|im_start|>{('user', 'assistant')[n % 2]}\n{one}{end}"
        parts = text.split(end)
        rounds = [end.join(parts[:3])] + [end.join(parts[n : n + 2]) for n in range(3, len(parts), 2)]
        return self.by_rounds(text, rounds, texts[1::2], f"{end}<|im_start|>assistant\n", has_image, tail=0)


def normalised(texts: list[str], tagged: bool) -> list[str]:
    """Place image placeholders as the official training code does."""
    placed = []
    for text in texts:
        if "<image>" in text:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
            text = text.replace("<image>", "<Image><image></Image>") if tagged else text
        placed.append(text)
    return placed


WORDS = [
    "A", "cat", "is", "sleeping", ".", "What", "?", "\n", "\n\n", " ", "  ", "\t", "é",
    "日本語", "😀", "👩‍👩‍👧", "e\u0301", "<", "s>",
    "###", "#", "ASSISTANT", ":", "[INST]", "</", "\0", "▁", "1.", "``", "\u200b", "\r\n", "Human", "</Image>",
]  # fmt: skip


def random_text(draw: random.Random) -> str:
    glue = draw.choice(["", " ", " ", "  "])
    text = glue.join(draw.choices(WORDS, k=draw.randrange(1, 9)))
    return draw.choice(["", "", " ", "\n"]) + text + draw.choice(["", "", " ", "\n", "  "])


def random_conversation(draw: random.Random, has_image: bool) -> list[str]:
    texts = [random_text(draw) for _ in range(2 * draw.randrange(1, 5))]
    if has_image:
        asks = 2 * draw.randrange(len(texts) // 2)
        texts[asks] = draw.choice(
            ["<image>\n{}", "{}\n<image>", "<image>{}", "{} <image> {}<image>", "<image>"]
        ).format(*[texts[asks]] * 2)
    elif draw.random() < 0.3:
        texts[0] += "<image>"
    return texts


def as_turns(texts: list[str]) -> list[Message]:
    return [Message(("human", "gpt")[n % 2], text) for n, text in enumerate(texts)]


def compare(tokenizer: Tokenizer, name: str, count: Callable[[list[str], bool], Counted], *, number: int = 150) -> None:
    """Random conversations: equal labels, or an error where the official code masks the sample."""
    draw, template, encoded, refused = random.Random(name), get_template(name), 0, 0
    for _ in range(number):
        has_image = draw.random() < 0.5
        texts = random_conversation(draw, has_image)
        turns = as_turns(texts)
        try:
            expected = count(normalised(texts, template.tags_image) if has_image else texts, has_image)
        except (ValueError, AssertionError):
            with pytest.raises(DataError):
                encode_conversation(tokenizer, template, turns, has_image=has_image, max_length=100_000)
            refused += 1
            continue
        got = encode_conversation(tokenizer, template, turns, has_image=has_image, max_length=100_000)
        assert list(got.input_ids) == expected[0], texts
        assert list(got.labels) == [IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else i for i in expected[1]], texts
        encoded += 1
    assert encoded > 0.8 * number and encoded + refused == number


@pytest.fixture(scope="module")
def counting(tokenizer: Tokenizer) -> Counting:
    return Counting(tokenizer)


RULED = pytest.mark.parametrize("rule", ["legacy", "transformers-4.31"])  # for 4.34, LLaVA counts otherwise


def under(rule: TokenizerRule, tokenizer: Tokenizer) -> Tokenizer:
    return SentencePieceTokenizer(tokenizer.path, settings=TokenizerSettings(rule=rule))


@RULED
@pytest.mark.parametrize("name", TWO)
def test_two_as_counted(tokenizer: Tokenizer, rule: TokenizerRule, name: str):
    tokenizer = under(rule, tokenizer)
    counting = Counting(tokenizer)
    system = get_template(name).system
    compare(tokenizer, name, lambda texts, has_image: counting.two(system, texts, has_image))


@RULED
@pytest.mark.parametrize("name", LLAMA_2)
def test_llama_2_as_counted(tokenizer: Tokenizer, rule: TokenizerRule, name: str):
    tokenizer = under(rule, tokenizer)
    counting = Counting(tokenizer)
    system, start = get_template(name).system, "" if name == "mistral_instruct" else "<s>"
    compare(tokenizer, name, lambda texts, has_image: counting.llama_2(system, texts, has_image, start))


@RULED
@pytest.mark.parametrize("name", MPT)
def test_mpt_as_counted(chatml_tokenizer: Tokenizer, rule: TokenizerRule, name: str):
    chatml_tokenizer = under(rule, chatml_tokenizer)
    counting = Counting(chatml_tokenizer, specials=("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"))
    compare(chatml_tokenizer, name, lambda texts, has_image: counting.mpt(get_template(name).system, texts, has_image))


@pytest.mark.parametrize("name", V0)
def test_v0_as_counted(tokenizer: Tokenizer, counting: Counting, name: str):
    # The counts need a vocabulary like LLaMA's: "###" is one token at the start of a text and two after a newline.
    assert len(counting.ids("###")) == 2 and len(counting.ids("\n###")) == 5
    compare(tokenizer, name, lambda texts, has_image: counting.v0(get_template(name).system, texts, has_image))


def test_plain_as_counted(tokenizer: Tokenizer, counting: Counting):
    draw = random.Random(1)
    for _ in range(150):
        question, caption = random_text(draw), random_text(draw)
        turns = as_turns([f"{question}<image>", caption])
        got = encode_conversation(tokenizer, get_template("plain"), turns, has_image=True, max_length=100_000)
        ids, labels = counting.plain(caption)
        assert (list(got.input_ids), list(got.labels)) == (ids, labels)


def encode(
    tokenizer: Tokenizer, texts: list[str], *, name: str = "v1", has_image: bool = True, max_length: int = 2048
) -> EncodedConversation:
    return encode_conversation(
        tokenizer, get_template(name), as_turns(texts), has_image=has_image, max_length=max_length
    )


def trained_runs(tokenizer: Tokenizer, encoded: EncodedConversation) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special=False) for run in runs if run]


def test_the_quirks_by_name(tokenizer: Tokenizer):
    encoded = encode(tokenizer, ["What animal is this?\n<image>", "A cat.", "What is it doing?", "It is sleeping."])
    assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == 1 and IMAGE_TOKEN_INDEX not in encoded.labels
    at = encoded.input_ids.index(IMAGE_TOKEN_INDEX)
    [space] = tokenizer.encode("x</s> ")[-1:]
    assert encoded.input_ids[at - 1] == space and encoded.input_ids[at + 1 : at + 3] == (space, 13)
    assert encoded.input_ids[0] == 1 and encoded.input_ids.count(1) == 1
    assert trained_runs(tokenizer, encoded) == ["A cat.</s>", "It is sleeping.</s>"]
    end = encoded.input_ids.index(2)
    assert tokenizer.decode([encoded.input_ids[end + 1]]) == "USER"
    assert encoded.input_ids[end + 1] != tokenizer.encode("USER:")[0]

    plain = encode(tokenizer, ["Describe.\n<image>", "A cat."], name="plain")
    assert plain.input_ids == (1, IMAGE_TOKEN_INDEX, *tokenizer.encode("A cat.\n"))
    assert plain.labels == (IGNORE_INDEX, IGNORE_INDEX, *tokenizer.encode("A cat.\n"))

    v0 = encode(tokenizer, ["Q", "A"], name="share4v_v0", has_image=False)
    assert trained_runs(tokenizer, v0) == ["###", "### Assistant: A\n### "]


def test_leading_answer_is_dropped(tokenizer: Tokenizer):
    turns = [Message("gpt", "Hello!"), *as_turns(["Q", "A"])]
    for name in ("v1", "llama_2"):
        got = encode_conversation(tokenizer, get_template(name), turns, has_image=False, max_length=2048)
        assert got == encode(tokenizer, ["Q", "A"], name=name, has_image=False)
    v0 = encode_conversation(tokenizer, get_template("v0"), turns, has_image=False, max_length=2048)
    assert trained_runs(tokenizer, v0)[0] == "### Assistant: Hello!\n###"


def test_image_in_a_later_turn(tokenizer: Tokenizer):
    encoded = encode(tokenizer, ["Hi", "Hello", "And this? <image>", "A cat."])
    assert trained_runs(tokenizer, encoded) == ["Hello</s>", "A cat.</s>"]
    assert encoded.input_ids.index(IMAGE_TOKEN_INDEX) > encoded.input_ids.index(2)


@pytest.mark.parametrize("length", [1, 30, 45])
def test_truncation_cuts_ids_and_labels_together(tokenizer: Tokenizer, length: int):
    texts = ["<image>\nWhat animal is this?", "A cat. " * 20]
    whole, cut = encode(tokenizer, texts), encode(tokenizer, texts, max_length=length)
    assert len(whole.input_ids) == len(whole.labels) > 100
    assert cut == EncodedConversation(whole.input_ids[:length], whole.labels[:length])


def test_prompt_is_the_untrained_start_of_the_sample(tokenizer: Tokenizer, chatml_tokenizer: Tokenizer):
    texts = ["<image>\nWhat animal is this?", "A cat.", "What is it doing?", "It is sleeping."]
    for name in ("v1", "share4v_v1", "llama_2", "share4v_llama_2", "mistral_instruct", "mpt", "chatml_direct"):
        model = chatml_tokenizer if name in ("mpt", "chatml_direct") else tokenizer
        for asked in (1, 3):
            prompt = encode_prompt(model, get_template(name), as_turns(texts[:asked]), has_image=True)
            sample = encode(model, texts[: asked + 1], name=name)
            answer = next(n for n in range(len(prompt), len(sample.labels)) if sample.labels[n] != IGNORE_INDEX)
            assert (tuple(prompt), answer) == (sample.input_ids[:answer], len(prompt))
    assert encode_prompt(tokenizer, get_template("plain"), as_turns(["Describe it.\n<image>"]), has_image=True) == [
        1,
        IMAGE_TOKEN_INDEX,
    ]


def test_prompt_of_v1_ends_with_the_colon(tokenizer: Tokenizer):
    prompt = encode_prompt(tokenizer, get_template("v1"), as_turns(["Q <image>"]), has_image=False)
    assert prompt[0] == 1 and IMAGE_TOKEN_INDEX not in prompt
    assert tokenizer.decode(prompt).endswith("USER: Q <image> ASSISTANT:")


def test_prompt_may_hold_marks(tokenizer: Tokenizer):
    assert 2 in encode_prompt(tokenizer, get_template("v1"), as_turns(["What is </s> ASSISTANT: ?"]), has_image=False)


@pytest.mark.parametrize(
    "name, has_image, texts, message",
    [
        ("v1", False, [], "the conversation is empty"),
        ("v1", False, ["Q"], "turn 1 is the last and human's.*drop it"),
        ("v1", False, ["Q", "A", "Q2"], "turn 3 is the last"),
        ("v1", False, ["Q", ""], "turn 2, by gpt, is empty"),
        ("v1", True, ["Q", "A"], "0 turns have an <image> for 1 image; write it in exactly one turn"),
        ("v1", True, ["<image>", "A", "<image>\nQ", "A"], "2 turns have an <image>"),
        ("v1", False, ["Q</s>", "A"], "turn 1 has '</s>' in its text"),
        ("v1", False, ["Q", "A</s> more"], "turn 2 has '</s>' in its text"),
        (
            "v1",
            False,
            ["Q", "I say: ASSISTANT: hm"],
            "'ASSISTANT:' in its text, which opens an answer in template 'vicuna_v1'",
        ),
        ("v1", False, ["ASSISTANT: x", "A"], "'ASSISTANT:' in its text"),
        ("v1", False, ["Q ASSISTANT:", "A"], "'ASSISTANT:' in its text"),
        ("llama_2", False, ["Q [/INST] x", "A"], r"'\[/INST\]' in its text"),
        ("mpt", False, ["Q<|im_end|>", "A"], "'<|im_end|>' in its text"),
        ("v1", False, ["Q <unk>", "A"], "has <unk>.*remove"),
        (
            "plain",
            True,
            ["<image>", "A", "Q", "A"],
            "'plain' is for an image and its caption, two turns; got 4 turns with an image",
        ),
        ("plain", False, ["Q", "A"], "got 2 turns without an image; use another template"),
        ("plain", True, ["Describe.", "A"], "turn 1 has no <image>.*'Describe.'"),
        ("plain", True, ["<image>", "A <image>"], "2 turns have"),
    ],
)
def test_refused_conversations(tokenizer: Tokenizer, name: str, has_image: bool, texts: list[str], message: str):
    with pytest.raises(DataError, match=message):
        encode(tokenizer, texts, name=name, has_image=has_image)


@pytest.mark.parametrize(
    "turns, message",
    [
        ([Message("human", "Q"), Message("human", "Q2")], "turns 1 and 2 are both by human; the roles must alternate"),
        ([Message("gpt", "A")], "the conversation is empty"),
        ([Message("gpt", "A"), Message("gpt", "A"), Message("human", "Q")], "the first two turns are both by gpt"),
        ([Message("human", "Q"), Message("system", "S")], "turn 2 is by 'system'"),
    ],
)
def test_refused_roles(tokenizer: Tokenizer, turns: list[Message], message: str):
    with pytest.raises(DataError, match=message):
        encode_conversation(tokenizer, get_template("v1"), turns, has_image=False, max_length=10)


@pytest.mark.parametrize(
    "name, has_image, texts, message",
    [
        ("v1", False, [], "empty"),
        ("v1", False, ["Q", "A"], "turn 2 is the last and gpt's"),
        ("v1", True, ["Q"], "0 turns have an <image>"),
        ("plain", True, ["<image>", "A", "Q"], "asks for the caption of one image; got 3 turns"),
        ("plain", False, ["Q"], "got 1 turns without an image"),
    ],
)
def test_refused_prompts(tokenizer: Tokenizer, name: str, has_image: bool, texts: list[str], message: str):
    with pytest.raises(DataError, match=message):
        encode_prompt(tokenizer, get_template(name), as_turns(texts), has_image=has_image)
