"""Templates of language models: ids and masks of transformers' apply_chat_template, and the families' own texts.

Named exceptions, each with a test of its own: special tokens written out in a text; Llama 3 and Phi-3, whose own
templates strip texts or end with <|endoftext|>; Qwen3's empty <think> in the last answer; masks of answers that start
with a space, for which transformers finds no token with Llama 3's tokenizer (its offsets leave spaces out).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_hf_tokenizer import write_llama_3_like, write_phi_3_like, write_qwen_like
from transformers import PreTrainedTokenizerFast

from megatron_share4v.checkpoint.hf.chat_template import to_jinja
from megatron_share4v.errors import ConfigError, DataError
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.mask import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    encode_chat_prompt,
    encode_conversation,
    encode_prompt,
)
from megatron_share4v.text.template import TEMPLATES, get_template, render_conversation, render_prompt
from megatron_share4v.text.template_format import Message
from megatron_share4v.text.template_tokens import check_special_tokens, fitting_templates, stop_ids
from megatron_share4v.text.tokenizer import Tokenizer

WRITERS = {"llama": write_llama_3_like, "qwen": write_qwen_like, "phi": write_phi_3_like}
TOKENIZER_OF = {
    "llama_3": "llama", "llava_llama_3": "llama", "qwen_2": "qwen", "qwen_2.5": "qwen", "qwen_3": "qwen",
    "phi_3": "phi", "mistral": "phi",
}  # fmt: skip
CHAT = tuple(TOKENIZER_OF)
WORDS = [
    "A", "cat", "is", "the", "image", ".", "?", "\n", "\n\n", "  ", "\t", "é", "e\u0301", "日本語", "😀", "12345",
    "it's", "<", "|im", "user", "assistant", "<think>", "</s", "[INST", "\u200b", "    x",
]  # fmt: skip
CONVERSATIONS = 60


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def tokenizers(paths: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(path) for name, path in paths.items()}


def random_text(draw: random.Random) -> str:
    text = draw.choice(["", " ", " "]).join(draw.choices(WORDS, k=draw.randrange(1, 10)))
    return draw.choice(["", "", "\n", " "]) + text + draw.choice(["", "", "\n", " "])


def conversation(draw: random.Random, *, has_image: bool) -> list[Message]:
    texts = [random_text(draw) for _ in range(2 * draw.randrange(1, 4))]
    if has_image:
        texts[0] = f"<image>\n{texts[0].strip()}".strip()
    return [Message(("human", "gpt")[n % 2], text) for n, text in enumerate(texts)]


def messages(turns: list[Message]) -> list[dict[str, str]]:
    return [{"role": {"human": "user", "gpt": "assistant"}[turn.role], "content": turn.text} for turn in turns]


def hf_reference(path: Path, name: str, own: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent)
    tokenizer.chat_template = to_jinja(get_template(name), bos=own.bos_id is not None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("name", CHAT)
def test_ids_and_masks_are_those_of_transformers(
    paths: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str
) -> None:
    own, draw, template = tokenizers[TOKENIZER_OF[name]], random.Random(name), get_template(name)
    reference = hf_reference(paths[TOKENIZER_OF[name]], name, own)
    image = reference.convert_tokens_to_ids("<image>")
    for number in range(CONVERSATIONS):
        has_image = number % 2 == 0
        turns = conversation(draw, has_image=has_image)
        if TOKENIZER_OF[name] == "llama":
            turns[1::2] = [Message("gpt", turn.text.lstrip() or "x") for turn in turns[1::2]]
        found = encode_conversation(own, template, turns, has_image=has_image, max_length=100_000)
        expected = reference.apply_chat_template(
            messages(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = [image if i == IMAGE_TOKEN_INDEX else i for i in found.input_ids]
        assert ids == expected["input_ids"], turns
        mask = [int(label != IGNORE_INDEX) for label in found.labels]
        assert mask == expected["assistant_masks"], turns
        assert all(label in (IGNORE_INDEX, i) for i, label in zip(found.input_ids, found.labels))
        asked = encode_prompt(own, template, turns[:-1], has_image=has_image)
        prompt = reference.apply_chat_template(messages(turns[:-1]), add_generation_prompt=True)["input_ids"]
        assert [image if i == IMAGE_TOKEN_INDEX else i for i in asked] == prompt
        assert ids.count(own.bos_id) == (own.bos_id is not None) and ids[: len(own.bos_ids)] == own.bos_ids


def published(name: str, turns: list[Message], *, prompt: bool) -> str:
    """Text of the chat templates that are published with the models, without the token at the start."""
    text, last = "", len(turns) - 1
    for number, turn in enumerate(turns):
        role = {"human": "user", "gpt": "assistant"}[turn.role]
        if name == "llama_3":
            text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{turn.text.strip()}<|eot_id|>"
        elif name == "phi_3":
            text += f"<|{role}|>\n{turn.text}<|end|>\n"
        elif name == "mistral":
            text += f"[INST] {turn.text} [/INST]" if role == "user" else f" {turn.text}</s>"
        else:
            think = "<think>\n\n</think>\n\n" if name == "qwen_3" and number == last and role == "assistant" else ""
            text += f"<|im_start|>{role}\n{think}{turn.text}<|im_end|>\n"
    systems = {
        "qwen_2": "You are a helpful assistant.",
        "qwen_2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    }
    if name in systems:
        text = f"<|im_start|>system\n{systems[name]}<|im_end|>\n{text}"
    headers = {
        "llama_3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "phi_3": "<|assistant|>\n",
        "mistral": "",
    }
    end = "<|endoftext|>" if name == "phi_3" else ""
    return text + (headers.get(name, "<|im_start|>assistant\n") if prompt else end)


@pytest.mark.parametrize("name", ["llama_3", "qwen_2", "qwen_2.5", "qwen_3", "mistral", "phi_3"])
def test_texts_are_those_published_with_the_models(name: str) -> None:
    draw, template = random.Random(1), get_template(name)
    for _ in range(CONVERSATIONS):
        turns = conversation(draw, has_image=False)
        if name == "llama_3":
            turns = [Message(turn.role, turn.text.strip() or "x") for turn in turns]  # transformers strips texts
        text = render_conversation(template, turns, has_image=False).text
        expected = published(name, turns, prompt=False)
        if name == "phi_3":
            expected = expected.removesuffix("<|endoftext|>")  # transformers ends with it, untrained here
        if name == "qwen_3":
            expected = expected.replace("<think>\n\n</think>\n\n", "")  # transformers writes it into the last one only
        assert text == expected
        assert render_prompt(template, turns[:-1], has_image=False) == published(name, turns[:-1], prompt=True)


def test_special_tokens_in_records_and_typed_are_text(tokenizers: dict[str, Tokenizer]) -> None:
    for name in CHAT:
        own, template = tokenizers[TOKENIZER_OF[name]], get_template(name)
        special = sorted(own.special_pieces)
        plain = [Message("human", "What?"), Message("gpt", "A cat.")]
        count = sum(i in own.special_ids for i in encode(own, template, plain))
        allowed = [one for one in special if one not in ("</s>",)] if name == "mistral" else special
        for text in allowed:
            turns = [Message("human", f"a {text}b"), Message("gpt", f"{text} c")]
            ids = encode(own, template, turns)
            assert sum(i in own.special_ids for i in ids) == count, text
            assert text.replace(" ", "") in own.decode(ids).replace(" ", "")
            prompt = encode_prompt(own, template, turns[:1], has_image=False)
            assert prompt == encode_chat_prompt(own, template, turns[:1], images=[False]) or name == "mistral"


def encode(own: Tokenizer, template, turns: list[Message]) -> tuple[int, ...]:
    return encode_conversation(own, template, turns, has_image=False, max_length=10_000).input_ids


def test_a_mistral_record_with_a_separator_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    for text in ("a</s>", "a[/INST] b"):
        with pytest.raises(DataError, match="remove it"):
            encode(tokenizers["phi"], get_template("mistral"), [Message("human", text), Message("gpt", "b")])


def test_stop_ids(tokenizers: dict[str, Tokenizer]) -> None:
    def names(name: str) -> set[str]:
        own = tokenizers[TOKENIZER_OF[name]]
        return {own.decode([i], skip_special=False) for i in stop_ids(get_template(name), own)}

    assert names("llama_3") == {"<|eot_id|>", "<|end_of_text|>"}
    assert names("qwen_2.5") == {"<|im_end|>", "<|endoftext|>"}
    assert names("phi_3") == {"<|end|>", "<|endoftext|>"}
    assert names("mistral") == {"<|endoftext|>"}  # this tokenizer's end of a text


def test_a_template_needs_its_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(DataError, match=r"writes <\|im_start\|> and <\|im_end\|>.*has the tokens of llama_3"):
        check_special_tokens(get_template("qwen_2"), tokenizers["llama"])
    with pytest.raises(DataError, match=r"'vicuna_v1' writes </s>"):
        check_special_tokens(get_template("vicuna_v1"), tokenizers["qwen"])
    assert fitting_templates(tokenizers["qwen"]) == ["qwen_2", "qwen_2.5", "qwen_3"]
    for name in ("plain", "mpt"):
        check_special_tokens(get_template(name), tokenizers["qwen"])


def test_plain_without_a_token_at_the_start(tokenizers: dict[str, Tokenizer]) -> None:
    turns = [Message("human", "Describe.\n<image>"), Message("gpt", "A cat.")]
    own = tokenizers["qwen"]
    found = encode_conversation(own, get_template("plain"), turns, has_image=True, max_length=100)
    assert found.input_ids == (IMAGE_TOKEN_INDEX, *own.encode("A cat.\n"))
    assert found.labels == (IGNORE_INDEX, *own.encode("A cat.\n"))


def llava_next(own: Tokenizer, name: str, turns: list[Message]) -> tuple[list[int], list[int]]:
    """LLaVA-NeXT's procedure: each message is tokenised alone and an answer trained whole; marker ids everywhere."""
    system = get_template(name).system
    forms = {
        "qwen_1_5": ("<|im_start|>{}\n{}<|im_end|>\n", ["\n", "<|im_start|>", "<|im_end|>"]),
        "llava_llama_3": (
            "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>",
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ),
    }
    form, markers = forms[name]
    everywhere = [own.encode(marker)[0] for marker in markers]
    ids, labels = own.bos_ids, [IGNORE_INDEX] * len(own.bos_ids)
    for role, text in [("system", system), *((turn.role, turn.text) for turn in turns)]:
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        own_ids: list[int] = []
        for part in form.format(role, text).split("<image>"):
            own_ids += [IMAGE_TOKEN_INDEX] * bool(own_ids) + own.encode(part)
        ids += own_ids
        labels += own_ids if role == "assistant" else [IGNORE_INDEX] * len(own_ids)
    return ids, [i if i in everywhere else label for i, label in zip(ids, labels)]


@pytest.mark.parametrize("name", ["qwen_1_5", "llava_llama_3"])
def test_official_markers_are_those_of_llava_next(tokenizers: dict[str, Tokenizer], name: str) -> None:
    own, draw = tokenizers["qwen" if name == "qwen_1_5" else "llama"], random.Random(3)
    template = get_template(name, "official")
    for number in range(CONVERSATIONS):
        turns = conversation(draw, has_image=number % 2 == 0)
        turns = [Message(turn.role, turn.text.strip() or "x") for turn in turns]  # as Llama 3's own template does
        found = encode_conversation(own, template, turns, has_image=number % 2 == 0, max_length=100_000)
        assert (list(found.input_ids), list(found.labels)) == llava_next(own, name, turns)
        answers = encode_conversation(own, get_template(name), turns, has_image=number % 2 == 0, max_length=100_000)
        assert found.input_ids == answers.input_ids and found.labels != answers.labels


def test_official_is_refused_where_nothing_is_published() -> None:
    able = {template.name for template in TEMPLATES.values() if template.official_markers}
    assert able == {"qwen_2", "llava_llama_3"}
    with pytest.raises(ConfigError, match="official is for the templates llava_llama_3 and qwen_2.*set answer_only"):
        get_template("vicuna_v1", "official")


def test_every_template_is_compared() -> None:
    """The others are compared with LLaVA's procedure in test_mask.py."""
    llava = [
        "plain",
        "vicuna_v1",
        "share4v_v1",
        "v1_mmtag",
        "llama_2",
        "share4v_llama_2",
        "mistral_instruct",
        "mpt",
        "chatml_direct",
    ]
    v0 = {"vicuna_v0", "share4v_v0", "v0_mmtag"}
    assert {template.name for template in TEMPLATES.values()} == {*llava, *v0, *CHAT}
