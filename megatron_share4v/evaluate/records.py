"""Records of an evaluation: a question (Doc), its Prediction, the Decoding settings, and the Scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_share4v.errors import DataError
from megatron_share4v.text.template import IMAGE_PLACEHOLDER, get_template
from megatron_share4v.text.template_format import Template

ImageMode = Literal["pad", "crop"]


@dataclass(frozen=True, kw_only=True)
class Doc:
    """A benchmark question.

    id: unique in its benchmark and split, the same in every run. question_id: the official one, which may repeat (MME,
    TextVQA).

    prompt: the user's turn without the placeholder of the image. image: a file, its bytes, or None for a question about
    text alone. recorded: the prompt of the official answer file where that is not `prompt`. meta: what scoring and the
    official files need of the question.
    """

    id: str
    question_id: int | str
    prompt: str
    image: Path | bytes | None = None
    recorded: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turn(self) -> str:
        """User turn as given to the model, with the image placeholder."""
        return self.prompt if self.image is None else f"{IMAGE_PLACEHOLDER}\n{self.prompt}"

    def read_image(self) -> bytes | None:
        """Return the encoded image. Raises DataError when it cannot be read or is empty."""
        if not isinstance(self.image, Path):
            return self.image
        try:
            data = self.image.read_bytes()
        except OSError as error:
            raise DataError(
                f"image {self.image} of question {self.question_id}: cannot be read ({error.strerror}); "
                "download it again"
            ) from error
        if not data:
            raise DataError(f"image {self.image} of question {self.question_id}: is an empty file; download it again")
        return data


@dataclass(frozen=True)
class Answer:
    """Answer of a model to the question `id`, cleaned by Decoding.clean.

    prompt: as recorded in the official answer file.
    """

    id: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Failure:
    """A question that could not be put to the model, with the reason."""

    question_id: int | str
    image: str | None
    error: str

    def __str__(self) -> str:
        about = f" about {self.image}" if self.image else ""
        return f"question {self.question_id!r}{about}: {self.error}"


@dataclass(frozen=True)
class Decoding:
    """Decoding settings of a benchmark's official script; always greedy.

    image_mode: padded to a square (`pad`), or not (`crop`): resized and cropped at the centre, or resized to a square
    by a tower of that rule.

    system: "a curious user" (vicuna_v1) or "a curious human" (share4v_v1).
    """

    max_new_tokens: int
    image_mode: ImageMode
    system: Literal["user", "human"] = "user"
    stop: str = "</s>"

    @property
    def template(self) -> str:
        """Name of the chat template in text/template_data.py."""
        return {"user": "vicuna_v1", "human": "share4v_v1"}[self.system]

    def prompt_template(self, own: Template | None) -> Template:
        """Return the template of the prompts: the benchmark's, unless the model's own is of another language model."""
        return own if own is not None and own.of_language_model else get_template(self.template)

    def answer_end(self, own: Template | None) -> str:
        """Return the token that ends an answer in the template of the prompts."""
        return self.prompt_template(own).training.answer[1].strip()

    @property
    def aspect_ratio(self) -> Literal["pad", "square"]:
        """Aspect ratio setting for ImagePolicy in data/images/policy.py."""
        return "pad" if self.image_mode == "pad" else "square"

    def clean(self, text: str) -> str:
        """Clean a reply as the official scripts do: strip, drop one closing stop string, strip."""
        return text.strip().removesuffix(self.stop).strip()


@dataclass(frozen=True)
class Scores:
    """Metric values by name.

    headline: name of the metric in the paper's table; None when not available. note: the next step, or what the values
    leave out. complete: all questions that were given count in the values as the official script counts them.
    """

    values: Mapping[str, float]
    headline: str | None
    note: str = ""
    complete: bool = True

    @property
    def json_values(self) -> dict[str, float | None]:
        """Values with NaN replaced by None, which JSON can hold."""
        return {name: None if math.isnan(value) else value for name, value in self.values.items()}
