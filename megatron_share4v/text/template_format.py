"""Format of a conversation template: the fixed text around turns, the system prompt, its special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

IMAGE_PLACEHOLDER = "<image>"
HUMAN, GPT = "human", "gpt"
TrainedMarkers = Literal["answer_only", "official"]
"""Which tokens of a template are trained beside the answers and their ends; see Template.trained_markers."""


class Turn(Protocol):
    """One message of a conversation; `role` is "human" or "gpt"."""

    @property
    def role(self) -> str:
        """Author of the message."""

    @property
    def text(self) -> str:
        """Content of the message."""


@dataclass(frozen=True)
class Message:
    """Plain implementation of Turn."""

    role: str
    text: str


@dataclass(frozen=True)
class ConversationFormat:
    """Fixed text around the turns.

    `{system}` is replaced by the system prompt; opening and preamble are omitted without one. A conversation is:
    opening, then for each turn either `human` around its text or header plus `answer` around its text, then ending. The
    answers with their surrounding text, and the ending, are trained; with a `signal`, the signal and the header too.
    """

    human: tuple[str, str]
    header: str
    """Start of an answer; a prompt ends with it."""
    answer: tuple[str, str]
    opening: str = ""
    preamble: str = ""
    """Text inside the first human turn, before its own text."""
    between: str = ""
    """Text before every human turn except the first."""
    signal: str = ""
    """Text before every turn of either role."""
    ending: str = ""
    after_answer: str = ""
    """Text after every answer that is not trained."""
    answer_mark: str = ""
    """Separator at which the official training code starts an answer; empty if it does not split the text."""
    round_mark: str = ""
    """Separator at which the official training code ends a round."""


@dataclass(frozen=True)
class Template:
    """A conversation format. `dataclasses.replace(template, system=...)` changes the system prompt.

    training and prompt differ only in the v0 family, which was trained with one separator and is prompted with another.
    placeholder: text at the position of the image. caption_only: only the image and the answer are rendered (stage 1).
    examples: rounds at the start of every prompt, never in a training sample. special_tokens: special tokens in the
    text, which the tokenizer must have. stop_tokens: end an answer, beside the tokenizer's end of a text; those that
    the tokenizer does not have do not count. official_markers: tokens that the published training code trains wherever
    they are, together with the header of an answer and the text after it. trained_markers: whether these are trained
    ("official") or only answers and their ends.
    """

    name: str
    system: str
    training: ConversationFormat
    prompt: ConversationFormat
    placeholder: str = IMAGE_PLACEHOLDER
    caption_only: bool = False
    examples: tuple[Message, ...] = ()
    special_tokens: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    official_markers: tuple[str, ...] = ()
    trained_markers: TrainedMarkers = "answer_only"
    of_language_model: bool = False
    """Whether it is the chat template of a language model, with which evaluations prompt too."""

    @property
    def tags_image(self) -> bool:
        """Whether the placeholder is written between tags (mmtag)."""
        return self.placeholder != IMAGE_PLACEHOLDER
