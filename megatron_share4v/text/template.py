"""Conversation templates as data, and their rendering: the text, and which of its characters are trained.

Strings only: mask.py makes ids and labels. Holds all templates of ShareGPT4V and LLaVA; texts and rules are those of
ShareGPT4V (arXiv 2311.12793) and LLaVA-1.5 (arXiv 2310.03744) as published, quirks included.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from megatron_share4v.errors import ConfigError

IMAGE_PLACEHOLDER = "<image>"
HUMAN, GPT = "human", "gpt"


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
    answer_mark: str = ""
    """Separator at which the official training code starts an answer; empty if it does not split the text."""
    round_mark: str = ""
    """Separator at which the official training code ends a round."""


@dataclass(frozen=True)
class Template:
    """A conversation format. `dataclasses.replace(template, system=...)` changes the system prompt.

    training and prompt differ only in the v0 family, which was trained with one separator and is prompted with another.
    placeholder: text at the position of the image. caption_only: only the image and the answer are rendered (stage 1).
    examples: rounds at the start of every prompt, never in a training sample.
    """

    name: str
    system: str
    training: ConversationFormat
    prompt: ConversationFormat
    placeholder: str = IMAGE_PLACEHOLDER
    caption_only: bool = False
    examples: tuple[Message, ...] = ()

    @property
    def tags_image(self) -> bool:
        """Whether the placeholder is written between tags (mmtag)."""
        return self.placeholder != IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class RenderedConversation:
    """Text of a conversation, and its trained half-open character spans (start, stop), in order."""

    text: str
    trained: tuple[tuple[int, int], ...]


def get_template(name: str) -> Template:
    """Look up a template by name or alias. Raises ConfigError, naming the nearest, when there is none."""
    if name not in TEMPLATES:
        [nearest] = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)
        raise ConfigError(
            f"template {name!r} does not exist; the nearest is {nearest!r}. Choose one of "
            f"{', '.join(sorted(TEMPLATES))}"
        )
    return TEMPLATES[name]


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
    for part, is_trained in _parts(template.training, turns, system=template.system):
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


def _parts(frame: ConversationFormat, turns: Sequence[Turn], *, system: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a conversation in order, each with whether it is trained."""
    yield _with_system(frame.opening, system), False
    between, preamble = "", _with_system(frame.preamble, system)
    for turn in turns:
        yield frame.signal, True
        if turn.role == HUMAN:
            yield between + frame.human[0] + preamble + turn.text + frame.human[1], False
            between, preamble = frame.between, ""
        else:
            yield frame.header, bool(frame.signal)
            yield frame.answer[0] + turn.text + frame.answer[1], True
    yield frame.ending, True


def _with_system(part: str, system: str) -> str:
    """Insert the system prompt into `part`; empty without a system prompt."""
    return part.replace("{system}", system) if system else ""


# The answer's leading space is trained and the header's colon is not; the closing </s> is trained too.
_TWO = ConversationFormat(
    opening="{system} ",
    human=("USER: ", " "),
    header="ASSISTANT:",
    answer=(" ", "</s>"),
    answer_mark=" ASSISTANT: ",
    round_mark="</s>",
)
_LLAMA_2 = ConversationFormat(
    preamble="<<SYS>>\n{system}\n<</SYS>>\n\n",
    human=("[INST] ", " [/INST]"),
    header="",
    answer=(" ", " </s>"),
    between="<s>",
    answer_mark="[/INST] ",
    round_mark="</s>",
)
_MPT = ConversationFormat(
    opening="<|im_start|>system\n{system}<|im_end|>",
    human=("<|im_start|>user\n", "<|im_end|>"),
    header="<|im_start|>assistant\n",
    answer=("", "<|im_end|>"),
    answer_mark="<|im_end|><|im_start|>assistant\n",
    round_mark="<|im_end|>",
)
# v0 also trains the "###" before every turn, including human turns (the official mask starts at the third token, and
# LLaMA encodes "\n###" as two), the complete assistant turn with its name, and the "### " after the last turn.
_V0_TRAINING = ConversationFormat(
    opening="{system}\n\n",
    signal="###",
    human=(" Human: ", "\n"),
    header=" Assistant:",
    answer=(" ", "\n"),
    ending="### ",
)
_V0_PROMPT = ConversationFormat(
    opening="{system}###", human=("Human: ", "###"), header="Assistant:", answer=(" ", "###")
)
_PLAIN = ConversationFormat(human=("", ""), header="", answer=("", "\n"))

_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_USER_SYSTEM = f"A chat between a curious user and an artificial intelligence assistant. {_ASSISTANT.format('user')}"
_HUMAN_SYSTEM = f"A chat between a curious human and an artificial intelligence assistant. {_ASSISTANT.format('human')}"
# Published and trained without a space before "The visual content".
_TAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.The visual content will be "
    "provided with the following "
    "format: <Image>visual content</Image>."
)
_TAG = f"<Image>{IMAGE_PLACEHOLDER}</Image>"
_META_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not "
    "include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
    "responses are socially "
    "unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain "
    "why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the "
    "user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_ENERGY_EXAMPLE = (
    Message(HUMAN, "What are the key differences between renewable and non-renewable energy sources?"),
    Message(
        GPT,
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, "
        "geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and will eventually be "
        "depleted, such as coal, "
        "oil, and natural gas. Here are some key differences between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
        "are finite and will "
        "eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to "
        "air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than "
        "non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while "
        "non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their "
        "depletion can lead to economic and social instability.\n",
    ),
)


def _template(
    name: str, frame: ConversationFormat, system: str = "", *, prompt: ConversationFormat | None = None
) -> Template:
    """Create a template that uses the training format for prompts unless `prompt` is given."""
    return Template(name=name, system=system, training=frame, prompt=prompt or frame)


_ROWS: tuple[tuple[Template, tuple[str, ...]], ...] = (  # template, aliases
    (replace(_template("plain", _PLAIN), caption_only=True), ("v0_plain",)),
    (_template("vicuna_v1", _TWO, _USER_SYSTEM), ("v1",)),
    (_template("share4v_v1", _TWO, _HUMAN_SYSTEM), ("llava_v1",)),
    (replace(_template("v1_mmtag", _TWO, _TAG_SYSTEM), placeholder=_TAG), ()),
    (
        replace(_template("vicuna_v0", _V0_TRAINING, _HUMAN_SYSTEM, prompt=_V0_PROMPT), examples=_ENERGY_EXAMPLE),
        ("v0", "default"),
    ),
    (_template("share4v_v0", _V0_TRAINING, _HUMAN_SYSTEM, prompt=_V0_PROMPT), ("llava_v0",)),
    (replace(_template("v0_mmtag", _V0_TRAINING, _TAG_SYSTEM, prompt=_V0_PROMPT), placeholder=_TAG), ()),
    (_template("llama_2", _LLAMA_2, _META_SYSTEM), ()),
    (_template("share4v_llama_2", _LLAMA_2, _VISION_SYSTEM), ("llava_llama_2",)),
    (_template("mistral_instruct", replace(_LLAMA_2, between="")), ()),
    (_template("mpt", _MPT, _MPT_SYSTEM), ()),
    (_template("chatml_direct", _MPT, "Answer the questions."), ("mistral_direct",)),
)
TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {name: row for row, aliases in _ROWS for name in (row.name, *aliases)}
)
