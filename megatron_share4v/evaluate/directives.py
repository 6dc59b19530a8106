"""Answer directives of the official prompts, and the comparison of two prompts without them."""

from __future__ import annotations

from megatron_share4v.evaluate.metrics.vqa import OCR_MARK
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_LINES = frozenset(directive.strip() for directive in (SHORT, LETTER, LETTER_CN, UNANSWERABLE))


def question_text(prompt: str) -> str:
    """Return the question of a prompt for comparisons: without image placeholder, directives, OCR tokens and line
    breaks, in lower case.
    """
    lines = (line.strip() for line in prompt.replace(IMAGE_PLACEHOLDER, "").splitlines())
    kept = (line for line in lines if line and line not in _LINES and not line.startswith(OCR_MARK.strip()))
    return " ".join(kept).lower()
