"""Conversations to ids and labels, exactly as ShareGPT4V and LLaVA trained them; and prompts to ids.

One tokenisation with character spans; a label is kept where the template marks the character as trained. Each image is
one IMAGE_TOKEN_INDEX here; data/loading/collate.py expands it to patches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_share4v.errors import DataError
from megatron_share4v.text.template import (
    GPT,
    HUMAN,
    IMAGE_PLACEHOLDER,
    Message,
    RenderedConversation,
    Template,
    Turn,
    render_conversation,
    render_prompt,
)
from megatron_share4v.text.template_tokens import marker_ids
from megatron_share4v.text.tokenizer import Encoding, Tokenizer, check_unicode
from megatron_share4v.text.typed import encode_escaped, escape_placeholder, escape_special, escape_typed

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids and labels of a conversation.

    input_ids: the tokenizer's bos_id first, if it has one; IMAGE_TOKEN_INDEX for an image. labels: same length; the id
    where it is trained, else IGNORE_INDEX.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def encode_conversation(
    tokenizer: Tokenizer, template: Template, turns: Sequence[Turn], *, has_image: bool, max_length: int
) -> EncodedConversation:
    """Ids and labels of a training sample, truncated to `max_length` positions (an image counts as one).

    Without an image, a literal "<image>" is text. Raises DataError for an empty conversation or turn, roles that do not
    alternate from human to gpt, not exactly one placeholder with an image, and texts that the official code masks as a
    whole with a warning ("tokenization mismatch").

    mpt: the answer and its <|im_end|> are trained. (The published token counts are right for its first version only; in
    later versions they never match, so every sample is masked.)
    """
    turns = _checked(template, turns)
    if turns[-1].role != GPT:
        raise DataError(f"turn {len(turns)} is the last and {HUMAN}'s, so it has no answer to train; drop it")
    if template.caption_only and (len(turns) != 2 or not has_image):
        raise DataError(
            f"template {template.name!r} is for an image and its caption, two turns; got {len(turns)} turns "
            f"{_with(has_image)}; use another "
            "template for conversations"
        )
    if template.caption_only and IMAGE_PLACEHOLDER not in turns[0].text:
        raise DataError(
            f"turn 1 has no {IMAGE_PLACEHOLDER}, which template {template.name!r} needs: {_shown(turns[0].text)}; "
            f"write it there"
        )
    rendered = render_conversation(template, _escape(template, turns, tokenizer), has_image=has_image)
    _check_placeholders(rendered.text, has_image=has_image)
    _check_marks(template, turns, rendered)
    input_ids, labels = _label(tokenizer, template, rendered, has_image=has_image)
    if tokenizer.special_in_text and tokenizer.unk_id in input_ids:
        raise DataError(
            "the text has <unk>, whose id is also that of padding: the official code takes it for padding; remove it "
            "from the record"
        )
    return EncodedConversation(input_ids=tuple(input_ids[:max_length]), labels=tuple(labels[:max_length]))


def encode_prompt(tokenizer: Tokenizer, template: Template, turns: Sequence[Turn], *, has_image: bool) -> list[int]:
    """Ids to generate from: bos_id, the conversation, the open header of the answer; `turns` ends with a human turn.

    Raises DataError as encode_conversation does, except for separators and <unk> in a text, which users may write.
    """
    turns = _checked(template, turns)
    if turns[-1].role != HUMAN:
        raise DataError(
            f"turn {len(turns)} is the last and {GPT}'s, so there is nothing to answer; end with a {HUMAN} turn"
        )
    if template.caption_only and (len(turns) != 1 or not has_image):
        raise DataError(
            f"template {template.name!r} asks for the caption of one image; got {len(turns)} turns {_with(has_image)}"
        )
    text = render_prompt(template, _escape(template, turns, tokenizer), has_image=has_image)
    _check_placeholders(text, has_image=has_image)
    return _label(tokenizer, template, RenderedConversation(text=text, trained=()), has_image=has_image)[0]


def encode_chat_prompt(
    tokenizer: Tokenizer,
    template: Template,
    turns: Sequence[Turn],
    *,
    images: Sequence[bool],
    system: str | None = None,
    raw: bool = False,
) -> list[int]:
    """Ids to generate from, for user-typed turns: a typed <image>, special token or role header is plain text.

    images: for each turn, whether an image belongs to it; its IMAGE_TOKEN_INDEX precedes the turn's text, on its own
    line. A turn with an image may be empty. system: a typed system prompt in place of the template's. raw: read typed
    special tokens and role headers as such. Raises DataError as encode_prompt does, and for a text that is not valid
    Unicode.
    """
    for text in (*(turn.text for turn in turns), template.system if system is None else system):
        check_unicode(text)

    def escape(text: str) -> str:
        return escape_placeholder(text) if raw else escape_typed(text, template, tokenizer)

    typed = [Message(turn.role, escape(turn.text)) for turn in turns]
    system = escape_placeholder(template.system) if system is None else escape(system)
    opened: Sequence[Turn] = [
        Message(turn.role, _prepend_image(turn.text)) if image else turn
        for turn, image in zip(typed, images, strict=True)
    ]
    opened = _checked(template, opened)
    if opened[-1].role != HUMAN:
        raise DataError(f"the last turn is by {GPT}, so there is nothing to answer; end with a {HUMAN} turn")
    if template.caption_only and (len(opened) != 1 or not any(images)):
        raise DataError(
            f"template {template.name!r} asks for the caption of one image; got {len(opened)} turns "
            f"{_with(any(images))}"
        )
    text = render_prompt(replace(template, system=system), opened, has_image=any(images))
    return _label(tokenizer, template, RenderedConversation(text=text, trained=()), has_image=True, escaped=True)[0]


def _prepend_image(text: str) -> str:
    """Put the image placeholder before the text, on its own line."""
    return f"{IMAGE_PLACEHOLDER}\n{text}" if text else IMAGE_PLACEHOLDER


def _escape(template: Template, turns: Sequence[Turn], tokenizer: Tokenizer) -> Sequence[Turn]:
    """Mark special tokens that a record has in its texts, unless the tokenizer takes them for the tokens."""
    if tokenizer.special_in_text:
        return turns
    dropped = HUMAN if template.caption_only else ""
    return [
        turn if turn.role == dropped else Message(turn.role, escape_special(turn.text, tokenizer)) for turn in turns
    ]


def _label(
    tokenizer: Tokenizer,
    template: Template,
    rendered: RenderedConversation,
    *,
    has_image: bool,
    escaped: bool | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a rendered text. A token is trained if one of its characters is.

    The text on each side of an image is tokenised separately, with a leading space after the image as well if the
    tokenizer has space_after_image. escaped: whether the text has the marks of typed.py; None: as `_escape` leaves it.
    """
    encode = encode_escaped if escaped or not tokenizer.special_in_text else _encode
    everywhere = marker_ids(template, tokenizer)
    is_trained = bytearray(len(rendered.text))
    for start, stop in rendered.trained:
        is_trained[start:stop] = b"\1" * (stop - start)
    input_ids = tokenizer.bos_ids
    labels = [i if i in everywhere else IGNORE_INDEX for i in input_ids]
    position = 0
    chunks = rendered.text.split(IMAGE_PLACEHOLDER) if has_image else [rendered.text]
    for number, chunk in enumerate(chunks):
        if number:
            input_ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            position += len(IMAGE_PLACEHOLDER)
        ids, spans = encode(chunk, tokenizer, continues=bool(number) and not tokenizer.space_after_image)
        input_ids += ids
        for i, (begin, end) in zip(ids, spans):
            counts = any(is_trained[position + begin : position + max(begin + 1, end)]) or i in everywhere
            labels.append(i if counts else IGNORE_INDEX)
        position += len(chunk)
    return input_ids, labels


def _encode(text: str, tokenizer: Tokenizer, *, continues: bool = False) -> Encoding:
    return tokenizer.encode_with_offsets(text, continues=continues)


def _checked(template: Template, turns: Sequence[Turn]) -> Sequence[Turn]:
    """Validate the order of `turns` and drop a leading answer.

    The official code keeps a leading answer in v0, where it does not check the order.
    """
    if (template.training.answer_mark or template.special_tokens) and turns and turns[0].role == GPT:
        turns = turns[1:]
        if turns and turns[0].role == GPT:
            raise DataError(
                f"the first two turns are both by {GPT}; the roles must alternate: join them or drop the record"
            )
    if not turns:
        raise DataError(f"the conversation is empty (a leading {GPT} turn does not count); drop the record")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in (HUMAN, GPT):
            raise DataError(f"turn {number} is by {turn.role!r}; a turn is by {HUMAN!r} or {GPT!r}")
        if not turn.text:
            raise DataError(f"turn {number}, by {turn.role}, is empty; give it a text or drop the record")
        if number > 1 and turn.role == turns[number - 2].role:
            raise DataError(
                f"turns {number - 1} and {number} are both by {turn.role}; the roles must alternate: join them or "
                f"drop the record"
            )
    return turns


def _check_placeholders(text: str, *, has_image: bool) -> None:
    count = text.count(IMAGE_PLACEHOLDER)
    if has_image and count != 1:
        raise DataError(
            f"{count} turns have an {IMAGE_PLACEHOLDER} for 1 image; write it in exactly one turn, best in the first"
        )


def _check_marks(template: Template, turns: Sequence[Turn], rendered: RenderedConversation) -> None:
    """Reject a text in which the official code, which splits at separators, would find other answers."""
    frame = template.training
    if not frame.answer_mark:
        return
    for number, turn in enumerate(turns, start=1):
        if frame.round_mark in turn.text:
            raise DataError(
                f"turn {number} has {frame.round_mark!r} in its text, which ends an answer: {_shown(turn.text)}; "
                f"remove it"
            )
    found = [match.end() for match in re.finditer(re.escape(frame.answer_mark), rendered.text)]
    answers = [start + len(frame.answer[0]) for start, _ in rendered.trained]
    if found != answers:
        raise DataError(
            f"a turn has {frame.answer_mark.strip()!r} in its text, which opens an answer in template "
            f"{template.name!r}; remove it from the record"
        )


def _with(has_image: bool) -> str:
    return "with an image" if has_image else "without an image"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")
