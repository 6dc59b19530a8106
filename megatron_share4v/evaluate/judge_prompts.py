"""Judge prompts of LLaVA-Bench and MM-Vet, identical to the official scripts, with their retry rules.

Sources: eval_gpt_review_bench.py with its rule.json (the rules of conv, detail and complex are one text);
mm-vet_evaluator.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_share4v.evaluate.metrics.mm_vet import MAX_REPLIES, parse_grade
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile

JudgeReplies = Mapping[str, Sequence[str]]
"""Raw replies in order, by request id."""
Body = dict[str, Any]

_ASSISTANT = "You are a helpful and precise assistant for checking the quality of the answer."
_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user "
    "asks the question on observing an image. For your reference, the visual content in the image is represented with "
    "a few sentences describing "
    "the image. \n"  # the official prompt has this space
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale "
    "of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are "
    "separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the "
    "order in which the responses were presented does not affect your judgment."
)
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. "
    "Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice "
    "and snow. The meme is saying "
    "that the person has trust issues because the names of these countries do not accurately represent their "
    "landscapes. | "
)
_GRADING = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it "
    "is totally right only when all elements in the ground truth are present in the prediction, and <OR> means it is "
    "totally right when any one "
    "element in the ground truth is present in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, "
    "0.3, 0.4, 0.5, 0.6, 0.7, "
    "0.8, 0.9, or 1.0 (totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not "
    "very icy and Greenland isn't "
    "very green. | 0.4\n"
    f"{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush "
    "green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust issues' is "
    "a playful way to suggest "
    "that these contradictions can lead to distrust or confusion. The humor in this meme is derived from the "
    "unexpected contrast between the names "
    "of the countries and their actual physical characteristics. | 1.0\n"
)
_AGAIN = "\nPredict the correctness of the answer (digit): "


class Request(Protocol):
    """A judge request."""

    @property
    def id(self) -> str:
        """Unique id of the request."""
        ...

    def body(self, replies: Sequence[str]) -> Body | None:
        """Next chat completion given the replies so far, without the model name; None when complete."""
        ...


@dataclass(frozen=True)
class Review:
    """LLaVA-Bench review of two answers, the reference first. Never retried."""

    id: str
    context: str
    question: str
    reference: str
    answer: str

    def body(self, replies: Sequence[str]) -> Body | None:
        """Chat completion with temperature 0.2 and 1024 tokens."""
        if replies:
            return None
        content = (
            f"[Context]\n{self.context}\n\n[Question]\n{self.question}\n\n"
            f"[Assistant 1]\n{self.reference}\n\n[End of Assistant 1]\n\n[Assistant 2]\n{self.answer}\n\n[End of "
            "Assistant 2]\n\n"
            f"[System]\n{_RULE}\n\n"
        )
        messages = [{"role": "system", "content": _ASSISTANT}, {"role": "user", "content": content}]
        return {"messages": messages, "temperature": 0.2, "max_tokens": 1024}


@dataclass(frozen=True)
class Grade:
    """MM-Vet grade of one answer.

    Retried with one more sentence and rising temperature until a reply is a number, at most 5 replies.
    """

    id: str
    question: str
    truth: str
    answer: str
    profile: Profile = OFFICIAL

    def body(self, replies: Sequence[str]) -> Body | None:
        """Chat completion with temperature 0, then 0, 0.5, 1 and 1.5, and 3 tokens."""
        if len(replies) >= MAX_REPLIES or (replies and parse_grade(replies[-1], profile=self.profile) is not None):
            return None
        truth = self.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        content = f"{_GRADING}\n{self.question} | {truth} | {self.answer} | {_AGAIN if replies else ''}"
        temperature = 0.5 * max(len(replies) - 1, 0)
        return {"messages": [{"role": "user", "content": content}], "temperature": temperature, "max_tokens": 3}
