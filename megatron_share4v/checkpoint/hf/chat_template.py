"""Convert a conversation template to the Jinja chat template of transformers and vLLM, and detect it from one.

The rendered text equals text.template.render_prompt, after the token that starts a text. An image is a message part
{"type": "image"}; images go first, each on its own line. Text is not changed.
"""

from __future__ import annotations

import json

from megatron_share4v.errors import ConversionError
from megatron_share4v.text.template import HUMAN, IMAGE_PLACEHOLDER, TEMPLATES, Template

# to_jinja replaces |NAMES| by expressions. Every tag strips the whitespace around it: only expressions write text.
_JINJA = """\
|BOS|{%- set start = 1 if messages and messages[0]['role'] == 'system' else 0 -%}
{%- set system = messages[0]['content'] if start else |SYSTEM| -%}
{%- if system is not string -%}
  {%- set system = system | map(attribute='text') | join('\\n') -%}
{%- endif -%}
{%- if system -%}
  {{- |OPENING| -}}
{%- endif -%}
{{- |EXAMPLES| -}}
{%- for message in messages[start:] -%}
  {%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
    {{- raise_exception('messages must be an optional system message, then user and assistant in turn; \
one is by ' ~ message['role']) -}}
  {%- endif -%}
  {%- if message['content'] is string -%}
    {%- set text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] if part['type'] not in ['text', 'image'] -%}
      {{- raise_exception('a message has a part of type ' ~ part['type'] ~ '; the model reads text and image') -}}
    {%- endfor -%}
    {%- set images = message['content'] | selectattr('type', 'equalto', 'image') | map(attribute='type') | list -%}
    {%- set words = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | select \
| list -%}
    {%- set text = (|PLACEHOLDER| * (images | length) + words) | join('\\n') -%}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- (|FIRST| if loop.first else |LATER|) ~ |USER| ~ |HUMAN_END| -}}
  {%- else -%}
    {{- |HEADER| -}}
    {%- generation -%}
      {{- |ANSWER_START| ~ text ~ |ANSWER_END| -}}
    {%- endgeneration -%}
|AFTER_ANSWER|  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- |HEADER| -}}
{%- endif -%}
"""


def to_jinja(template: Template, *, bos: bool = True) -> str:
    """Return the Jinja source of a conversation template. bos: whether the tokenizer starts every text with a token.

    A first message of role "system" replaces the template's system prompt; an empty one removes it. Raises
    ConversionError for a template with the image in a round of its own, which message parts cannot express.
    """
    if template.tags_image:
        raise ConversionError(
            f"template {template.name!r} puts tags around the image and a round of its own before the question, "
            "which a Hugging Face chat template cannot express; export with the layout share4v"
        )
    frame = template.prompt
    assert not (frame.signal or frame.ending), (
        f"template {template.name!r}: the prompt frame contains text that only training writes"
    )
    human, later = frame.human[0], frame.between + frame.human[0]
    expressions = {
        "SYSTEM": _literal(template.system),
        "OPENING": _around_system(frame.opening),
        "EXAMPLES": _literal(_examples(template)),
        "PLACEHOLDER": f"[{_literal(IMAGE_PLACEHOLDER)}]",
        "FIRST": f"({_literal(human)} ~ ({_around_system(frame.preamble)} if system else ''))",
        "LATER": _literal(later),
        "USER": _literal(IMAGE_PLACEHOLDER) if template.caption_only else "text",
        "HUMAN_END": _literal(frame.human[1]),
        "HEADER": _literal(frame.header),
        "ANSWER_START": _literal(frame.answer[0]),
        "ANSWER_END": _literal(frame.answer[1]),
        "AFTER_ANSWER": f"    {{{{- {_literal(frame.after_answer)} -}}}}\n" if frame.after_answer else "",
    }
    source = _JINJA.replace("|BOS|", "{{- bos_token -}}\n" if bos else "")
    for name, expression in expressions.items():
        source = source.replace(f"|{name}|", expression)
    return source


def detect_template(source: str) -> str | None:
    """Return the name of the template whose Jinja source is `source`; None for other chat templates."""
    plain = (template for name, template in TEMPLATES.items() if name == template.name and not template.tags_image)
    return next((one.name for one in plain if source in (to_jinja(one), to_jinja(one, bos=False))), None)


def recognise_template(source: str) -> str | None:
    """Return the template whose markers a chat template of a language model's own files writes; None without one.

    A ChatML template without a default system prompt counts as qwen_3, whatever it does with thoughts and tools.
    """
    return next((name for name, marks in _MARKS if all(mark in source for mark in marks)), None)


_MARKS = (
    ("llama_3", ("<|start_header_id|>", "<|eot_id|>")),
    ("qwen_2.5", ("<|im_start|>", "You are Qwen, created by Alibaba Cloud.")),
    ("qwen_2", ("<|im_start|>", "You are a helpful assistant")),
    ("qwen_3", ("<|im_start|>", "<|im_end|>")),
    ("phi_3", ("<|end|>", "<|assistant|>")),
    ("llama_2", ("[INST]", "<<SYS>>")),
    ("mistral", ("[INST]", "[/INST]")),
)
"""Templates by what a published chat template contains; the first that fits counts."""


def _examples(template: Template) -> str:
    """Render the example rounds at the start of every prompt."""
    frame = template.prompt
    assert not (template.examples and (frame.between or frame.preamble)), (
        f"template {template.name!r}: examples would count as turns"
    )
    return "".join(
        frame.human[0] + turn.text + frame.human[1]
        if turn.role == HUMAN
        else frame.header + frame.answer[0] + turn.text + frame.answer[1]
        for turn in template.examples
    )


def _around_system(text: str) -> str:
    """Return the expression that writes `text` with the system prompt inserted."""
    return " ~ system ~ ".join(_literal(part) for part in text.split("{system}"))


def _literal(text: str) -> str:
    return json.dumps(text)
