"""Typed <image> stays text in chat prompts; images are placed by the message structure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_share4v.errors import DataError
from megatron_share4v.text.mask import IMAGE_TOKEN_INDEX, encode_chat_prompt, encode_prompt
from megatron_share4v.text.template import TEMPLATES, Message, get_template
from megatron_share4v.text.tokenizer import Tokenizer

QUESTION = "What animal is this?"


@pytest.mark.parametrize("name", sorted({template.name for template in TEMPLATES.values()}))
def test_as_a_prompt_with_the_image_written_in_front(tokenizer: Tokenizer, name: str) -> None:
    template = get_template(name)
    turns = [Message("human", QUESTION), Message("gpt", "A cat."), Message("human", "Is it looking?")][
        : 1 if template.caption_only else 3
    ]
    written = [Message("human", f"<image>\n{QUESTION}"), *turns[1:]]
    expected = encode_prompt(tokenizer, template, written, has_image=True)
    assert encode_chat_prompt(tokenizer, template, turns, images=[True, *[False] * (len(turns) - 1)]) == expected
    if not template.caption_only:
        assert encode_chat_prompt(tokenizer, template, turns, images=[False] * 3) == encode_prompt(
            tokenizer, template, turns, has_image=False
        )


@pytest.mark.parametrize("image", [True, False])
def test_typed_placeholders_stay(tokenizer: Tokenizer, image: bool) -> None:
    template = get_template("vicuna_v1")
    template = replace(template, system=f"{template.system} <image>")
    turns = [Message("human", "<image> is <image>?"), Message("gpt", "An <image>."), Message("human", "\n<image>\n")]
    ids = encode_chat_prompt(tokenizer, template, turns, images=[image, False, False])
    assert ids.count(IMAGE_TOKEN_INDEX) == int(image)
    text = "".join(tokenizer.decode(part) for part in _split(ids))
    assert text.count("<image>") == 5


def _split(ids: list[int]) -> list[list[int]]:
    at = [place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
    return [ids[start:stop] for start, stop in zip([0, *(place + 1 for place in at)], [*at, len(ids)])]


def test_images_in_several_turns_and_without_words(tokenizer: Tokenizer) -> None:
    template = get_template("vicuna_v1")
    turns = [Message("human", ""), Message("gpt", "A cat."), Message("human", QUESTION)]
    ids = encode_chat_prompt(tokenizer, template, turns, images=[True, False, True])
    assert ids.count(IMAGE_TOKEN_INDEX) == 2
    alone = encode_chat_prompt(tokenizer, template, turns[:1], images=[True])
    assert alone == encode_prompt(tokenizer, template, [Message("human", "<image>")], has_image=True)


@pytest.mark.parametrize(
    ("turns", "images", "words"),
    [
        ([], [], "conversation is empty"),
        ([Message("human", "")], [False], "is empty"),
        ([Message("human", "a"), Message("gpt", "b")], [True, False], "nothing to answer"),
        ([Message("human", "a"), Message("human", "b")], [False, False], "both by human"),
        ([Message("human", "\ud800")], [True], "half a surrogate pair"),
    ],
)
def test_refused(tokenizer: Tokenizer, turns: list[Message], images: list[bool], words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode_chat_prompt(tokenizer, get_template("vicuna_v1"), turns, images=images)


def test_what_one_token_adds(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("A cat, Grüße 世 <x>")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == " A cat, Grüße 世 <x>"
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"</s>"
    assert all(
        len(tokenizer.token_bytes(i).decode("utf-8", "replace")) <= max(tokenizer.max_piece_length, 3)
        for i in range(tokenizer.vocab_size)
    )
