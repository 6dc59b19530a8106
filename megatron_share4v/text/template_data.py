"""Texts of all templates: those of ShareGPT4V and LLaVA as published, quirks included, and those of language models.

Rules are those of ShareGPT4V (arXiv 2311.12793), LLaVA-1.5 (arXiv 2310.03744), LLaVA-NeXT, and of the chat templates
that are published with Llama 3, Qwen, Mistral and Phi-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_share4v.text.template_format import (
    GPT,
    HUMAN,
    IMAGE_PLACEHOLDER,
    ConversationFormat,
    Message,
    Template,
)

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
_LLAMA_3 = ConversationFormat(
    opening="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
    human=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer=("", "<|eot_id|>"),
)
# Unlike mpt, a newline follows <|im_end|>; it is not trained.
_CHATML = ConversationFormat(
    opening="<|im_start|>system\n{system}<|im_end|>\n",
    human=("<|im_start|>user\n", "<|im_end|>\n"),
    header="<|im_start|>assistant\n",
    answer=("", "<|im_end|>"),
    after_answer="\n",
)
_MISTRAL = replace(_LLAMA_2, preamble="{system}\n\n", answer=(" ", "</s>"), between="")
_PHI_3 = ConversationFormat(
    opening="<|system|>\n{system}<|end|>\n",
    human=("<|user|>\n", "<|end|>\n"),
    header="<|assistant|>\n",
    answer=("", "<|end|>"),
    after_answer="\n",
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
_HELPFUL_SYSTEM = "You are a helpful assistant."
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


_IM = ("<|im_start|>", "<|im_end|>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_TOKENS: Mapping[ConversationFormat, tuple[tuple[str, ...], tuple[str, ...]]] = {
    _TWO: (("</s>",), ()),
    _LLAMA_2: (("</s>",), ()),
    replace(_LLAMA_2, between=""): (("</s>",), ()),
    _MISTRAL: (("</s>",), ()),
    _MPT: ((), ("<|im_end|>",)),  # also used with tokenizers that do not have the tokens
    _LLAMA_3: (_HEADERS, ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")),
    _CHATML: (_IM, ("<|im_end|>", "<|endoftext|>")),
    _PHI_3: (("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>", "<|endoftext|>")),
}
"""Special tokens and stop tokens of each format."""


def _template(
    name: str, frame: ConversationFormat, system: str = "", *, prompt: ConversationFormat | None = None
) -> Template:
    """Create a template that uses the training format for prompts unless `prompt` is given."""
    special, stop = _TOKENS.get(frame, ((), ()))
    return Template(name, system, frame, prompt or frame, special_tokens=special, stop_tokens=stop)


def _chat(name: str, frame: ConversationFormat, system: str = "") -> Template:
    """Create the template of a language model."""
    return replace(_template(name, frame, system), of_language_model=True)


ROWS: tuple[tuple[Template, tuple[str, ...]], ...] = (  # template, aliases
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
    (_chat("mistral", _MISTRAL), ()),
    (_chat("llama_3", _LLAMA_3), ()),
    # LLaVA-NeXT also means "\n\n", but looks it up by a name that byte-level vocabularies do not have.
    (
        replace(_chat("llava_llama_3", _LLAMA_3, _VISION_SYSTEM), official_markers=("<|begin_of_text|>", *_HEADERS)),
        (),
    ),
    (replace(_chat("qwen_2", _CHATML, _HELPFUL_SYSTEM), official_markers=("\n", *_IM)), ("qwen_1_5",)),
    (_chat("qwen_2.5", _CHATML, f"You are Qwen, created by Alibaba Cloud. {_HELPFUL_SYSTEM}"), ()),
    (_chat("qwen_3", _CHATML), ()),
    (_chat("phi_3", _PHI_3), ()),
)
