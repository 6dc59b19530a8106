"""Rendering of conversation templates: the text, and which of its characters are trained.

Strings only: mask.py makes ids and labels. template_format.py says what a template is, template_data.py has them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from megatron_share4v.errors import ConfigError
from megatron_share4v.text.template_data import ROWS
from megatron_share4v.text.template_format import (
    GPT,
    HUMAN,
    IMAGE_PLACEHOLDER,
    ConversationFormat,
    Message,
    Template,
    TrainedMarkers,
    Turn,
)

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {name: row for row, aliases in ROWS for name in (row.name, *aliases)}
)


@dataclass(frozen=True)
class RenderedConversation:
    """Text of a conversation, and its trained half-open character spans (start, stop), in order."""

    text: str
    trained: tuple[tuple[int, int], ...]


def get_template(name: str, trained_markers: TrainedMarkers = "answer_only") -> Template:
    """Look up a template by name or alias.

    Raises ConfigError, naming the nearest, when there is none; for trained_markers "official", when no published
    training code trains more than the answers of this template.
    """
    if name not in TEMPLATES:
        [nearest] = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)
        raise ConfigError(
            f"template {name!r} does not exist; the nearest is {nearest!r}. Choose one of "
            f"{', '.join(sorted(TEMPLATES))}"
        )
    template = TEMPLATES[name]
    if trained_markers == "official" and not template.official_markers:
        able = sorted({one.name for one in TEMPLATES.values() if one.official_markers})
        raise ConfigError(
            f"trained_markers official is for the templates {' and '.join(able)}, whose published code trains markers; "
            f"for {template.name!r} set answer_only"
        )
    return template if trained_markers == "answer_only" else replace(template, trained_markers=trained_markers)


def normalise_placeholders(text: str, *, placeholder: str = IMAGE_PLACEHOLDER) -> str:
    """Move the placeholder of a turn to the front, on its own line, and remove all others, as in training.

    A text without <image> is returned unchanged; one with it is also stripped.
    """
    if IMAGE_PLACEHOLDER not in text:
        return text
    bare = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return f"{IMAGE_PLACEHOLDER}\n{bare}".strip().replace(IMAGE_PLACEHOLDER, placeholder)


def render_conversation(template: Template, turns: Sequence[Turn], *, has_image: bool) -> RenderedConversation:
    """Render a whole conversation for training.

    `turns` must be in order and complete (mask.py checks); <image> is text unless `has_image`.
    """
    if has_image:
        turns = [
            Message(turn.role, normalise_placeholders(turn.text, placeholder=template.placeholder)) for turn in turns
        ]
    if template.caption_only:
        # Stage 1 as published drops the instruction: image, caption, newline, and no end-of-sentence token.
        turns = [Message(turn.role, IMAGE_PLACEHOLDER if turn.role == HUMAN else turn.text) for turn in turns]
    text = ""
    trained: list[tuple[int, int]] = []
    for part, is_trained in _parts(
        template.training,
        turns,
        system=template.system,
        whole_message=template.trained_markers == "official",
    ):
        if part and is_trained:
            start = trained.pop()[0] if trained and trained[-1][1] == len(text) else len(text)
            trained.append((start, len(text) + len(part)))
        text += part
    return RenderedConversation(text=text, trained=tuple(trained))


def render_prompt(template: Template, turns: Sequence[Turn], *, has_image: bool) -> str:
    r"""Render a conversation that ends with a human turn, for generation, up to the header of the answer.

    A turn that starts with "<image>\n" and has no other placeholder stays unchanged: the official evaluations do not
    strip questions.
    """
    if has_image:
        turns = _place_for_prompt(template, turns)
    if template.caption_only:
        turns = [Message(turn.role, IMAGE_PLACEHOLDER) for turn in turns]
    parts = _parts(template.prompt, [*template.examples, *turns], system=template.system)
    return "".join(part for part, _ in parts) + template.prompt.header


def _place_for_prompt(template: Template, turns: Sequence[Turn]) -> list[Message]:
    """Place the image placeholder of each turn as the official inference code does."""
    placed: list[Message] = []
    for turn in turns:
        text = turn.text
        if IMAGE_PLACEHOLDER in text and template.tags_image:
            # The official chat puts a tagged image into a separate round; training puts it into the question.
            placed += [Message(HUMAN, template.placeholder), Message(GPT, "Received.")]
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        elif not text.startswith(f"{IMAGE_PLACEHOLDER}\n") or text.count(IMAGE_PLACEHOLDER) > 1:
            text = normalise_placeholders(text)
        placed.append(Message(turn.role, text))
    return placed


def _parts(
    frame: ConversationFormat, turns: Sequence[Turn], *, system: str, whole_message: bool = False
) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a conversation in order, each with whether it is trained.

    whole_message: the header of an answer and the text after it are trained too.
    """
    yield _with_system(frame.opening, system), False
    between, preamble = "", _with_system(frame.preamble, system)
    for turn in turns:
        yield frame.signal, True
        if turn.role == HUMAN:
            yield between + frame.human[0] + preamble + turn.text + frame.human[1], False
            between, preamble = frame.between, ""
        else:
            yield frame.header, bool(frame.signal) or whole_message
            yield frame.answer[0] + turn.text + frame.answer[1], True
            yield frame.after_answer, whole_message
    yield frame.ending, True


def _with_system(part: str, system: str) -> str:
    """Insert the system prompt into `part`; empty without a system prompt."""
    return part.replace("{system}", system) if system else ""
