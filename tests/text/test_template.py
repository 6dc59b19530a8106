"""Rendered text equal to the published text, and trained spans equal to the answers."""

from dataclasses import replace

import pytest

from megatron_share4v.errors import ConfigError
from megatron_share4v.text.template import (
    TEMPLATES,
    Message,
    get_template,
    normalise_placeholders,
    render_conversation,
    render_prompt,
)

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = V1_SYSTEM.replace("user", "human")
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, "
    "and assist the user with a variety of tasks using natural language."
)
ROUNDS = (Message("human", "Q1\n<image>"), Message("gpt", "A1"), Message("human", "Q2"), Message("gpt", "A2"))

TRAINING_TEXTS = {
    "vicuna_v1": f"{V1_SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "share4v_v1": f"{HUMAN_SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "vicuna_v0": f"{HUMAN_SYSTEM}\n\n### Human: <image>\nQ1\n### Assistant: A1\n### Human: Q2\n### Assistant: A2\n### ",
    "share4v_v0": f"{HUMAN_SYSTEM}\n\n### Human: <image>\nQ1\n### Assistant: A1\n"
    "### Human: Q2\n### Assistant: A2\n### ",
    "share4v_llama_2": f"[INST] <<SYS>>\n{VISION_SYSTEM}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s>"
    "<s>[INST] Q2 [/INST] A2 </s>",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>",
    "chatml_direct": (
        "<|im_start|>system\nAnswer the "
        "questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>"
    ),
}
PROMPTS = {
    "vicuna_v1": f"{V1_SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "share4v_v0": f"{HUMAN_SYSTEM}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:",
    "share4v_llama_2": f"[INST] <<SYS>>\n{VISION_SYSTEM}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
    "chatml_direct": (
        "<|im_start|>system\nAnswer the "
        "questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
    ),
}


@pytest.mark.parametrize("name", TRAINING_TEXTS)
def test_training_text(name: str):
    assert render_conversation(get_template(name), ROUNDS, has_image=True).text == TRAINING_TEXTS[name]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_text(name: str):
    assert render_prompt(get_template(name), ROUNDS[:3], has_image=True) == PROMPTS[name]


@pytest.mark.parametrize(
    "name, segments",
    [
        ("vicuna_v1", [" A1</s>", " A2</s>"]),
        ("share4v_llama_2", [" A1 </s>", " A2 </s>"]),
        ("mistral_instruct", [" A1 </s>", " A2 </s>"]),
        ("mpt", ["A1<|im_end|>", "A2<|im_end|>"]),
        ("share4v_v0", ["###", "### Assistant: A1\n###", "### Assistant: A2\n### "]),
    ],
)
def test_trained_spans(name: str, segments: list[str]):
    rendered = render_conversation(get_template(name), ROUNDS, has_image=True)
    assert [rendered.text[start:stop] for start, stop in rendered.trained] == segments


def test_plain_is_image_caption_newline():
    rendered = render_conversation(
        get_template("plain"), [Message("human", "Describe it.\n<image>"), Message("gpt", " A cat.")], has_image=True
    )
    assert rendered.text == "<image> A cat.\n" and rendered.trained == ((7, 15),)
    assert render_prompt(get_template("plain"), [Message("human", "Describe it.")], has_image=True) == "<image>"


@pytest.mark.parametrize(
    "names",
    [
        ("plain", "v0_plain"),
        ("vicuna_v1", "v1"),
        ("share4v_v1", "llava_v1"),
        ("share4v_v0", "llava_v0"),
        ("vicuna_v0", "v0", "default"),
        ("v0_mmtag",),
        ("v1_mmtag",),
        ("llama_2",),
        ("share4v_llama_2", "llava_llama_2"),
        ("mpt",),
        ("chatml_direct", "mistral_direct"),
        ("mistral_instruct",),
    ],
)
def test_names(names: tuple[str, ...]):
    for name in names:
        assert get_template(name) is get_template(names[0]) is TEMPLATES[name]
    assert get_template(names[0]).name == names[0]


def test_unknown_name():
    with pytest.raises(ConfigError, match="'vicuna_v3' does not exist; the nearest is 'vicuna_v"):
        get_template("vicuna_v3")
    with pytest.raises(ConfigError, match="Choose one of chatml_direct, default"):
        get_template("")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Q\n<image>", "<image>\nQ"),
        ("<image>\nQ", "<image>\nQ"),
        ("<image>a<image> b <image>", "<image>\na b"),
        (" <image> ", "<image>"),
        ("<image>", "<image>"),
        ("  no image ", "  no image "),
        ("<image>\n\n Q \n", "<image>\nQ"),
    ],
)
def test_normalise_placeholders(text: str, expected: str):
    assert normalise_placeholders(text) == expected


def test_text_only_records_are_not_touched():
    turns = [Message("human", " what is <image>? "), Message("gpt", "A tag.")]
    assert (
        " what is <image>?  ASSISTANT: A tag." in render_conversation(get_template("v1"), turns, has_image=False).text
    )
    assert render_prompt(get_template("v1"), turns[:1], has_image=False).endswith("USER:  what is <image>?  ASSISTANT:")


def test_tagged_image():
    template = get_template("v1_mmtag")
    assert "natural language.The visual" in template.system
    assert (
        " USER: <Image><image></Image>\nQ1 ASSISTANT: A1</s>"
        in render_conversation(template, ROUNDS, has_image=True).text
    )
    assert render_prompt(template, ROUNDS[:1], has_image=True).endswith(
        "<Image>visual content</Image>. USER: <Image><image></Image> ASSISTANT: Received.</s>USER: Q1 ASSISTANT:"
    )
    assert (
        "### Human: <Image><image></Image>\nQ1\n### Assistant"
        in render_conversation(get_template("v0_mmtag"), ROUNDS, has_image=True).text
    )


def test_v0_prompt_opens_with_its_example():
    prompt = render_prompt(get_template("v0"), [Message("human", "Q")], has_image=False)
    assert prompt.startswith(f"{HUMAN_SYSTEM}###Human: What are the key differences between renewable")
    assert prompt.endswith("and social instability.\n###Human: Q###Assistant:")
    assert "renewable" not in render_conversation(get_template("v0"), ROUNDS, has_image=True).text


def test_prompt_keeps_a_question_that_is_already_placed():
    prompt = render_prompt(get_template("v1"), [Message("human", "<image>\n Q ")], has_image=True)
    assert prompt.endswith("USER: <image>\n Q  ASSISTANT:")
    prompt = render_prompt(get_template("v1"), [Message("human", " Q <image>")], has_image=True)
    assert prompt.endswith("USER: <image>\nQ ASSISTANT:")


def test_another_system_prompt():
    turns = [Message("human", "Q")]
    assert (
        render_prompt(replace(get_template("v1"), system="Be {brief}."), turns, has_image=False)
        == "Be {brief}. USER: Q ASSISTANT:"
    )
    assert render_prompt(replace(get_template("v1"), system=""), turns, has_image=False) == "USER: Q ASSISTANT:"
    assert (
        render_prompt(replace(get_template("mistral_instruct"), system="S"), turns, has_image=False)
        == "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"
    )


def test_meta_system_prompt_has_its_two_spaces():
    assert "being safe.  Your answers" in render_conversation(get_template("llama_2"), ROUNDS, has_image=True).text
