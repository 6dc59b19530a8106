"""Compare an exported model in transformers with its checkpoint: token ids, pixels, logits and greedy answers.

Runs in one process. This is the only module of the package that imports transformers. The export is loaded like a
user's model: through the Auto classes, offline, from its directory alone. L is the number of positions of a prompt with
its image slots, V our vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from megatron_share4v.checkpoint.hf.naming import detect_naming
from megatron_share4v.checkpoint.hf.source.reader import open_weights_directory
from megatron_share4v.checkpoint.hf.weight_map import weight_mappings
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.pil_decoder import encode_png, open_rgb
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.loading.prompt import Prompt, make_prompt
from megatron_share4v.data.records import Batch, Turn
from megatron_share4v.errors import ConversionError, OpsError
from megatron_share4v.infer.session import Question, Session
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.optimizer import unwrap_model
from megatron_share4v.model.initialize import iter_shards
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.text.template import IMAGE_PLACEHOLDER, render_prompt

MAX_NEW_TOKENS = 16
LOGIT_TOLERANCE = 1e-4
"""Tolerance in fp32, for sums in a different order through a few dozen layers.

Absolute for logits up to 1 and relative to the largest one beyond, since rounding errors grow with the values, and
trained models of 32 layers and more have logits of several dozens. bf16 weights are also compared in fp32.
"""
_QUESTIONS = (
    "Describe this image in detail.",
    "What is this?\nAnswer  in one word.",
    "What colour is the object on the left?",
)

_SIZES = ((96, 96), (76, 96), (96, 76))  # height and width in pixels, one for each question


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Result of a comparison over all questions."""

    questions: int
    ids_equal: bool
    """Whether the export's tokenizer gives our ids for the text of our prompts."""
    pixels_equal: bool
    greedy_equal: bool
    max_logit_diff: float
    """Largest absolute difference over all positions and the V tokens of our vocabulary."""
    logit_scale: float
    """Largest absolute value of our logits."""
    template: str = "equal"
    """"equal" when the export's chat template renders our prompts, or else what it does instead."""

    @property
    def accepted_logit_diff(self) -> float:
        """Largest `max_logit_diff` that counts as agreement."""
        return LOGIT_TOLERANCE * max(1.0, self.logit_scale)

    @property
    def holds(self) -> bool:
        """Whether both models compute the same from the same ids and images."""
        return self.pixels_equal and self.greedy_equal and self.max_logit_diff <= self.accepted_logit_diff

    @property
    def holds_with_text(self) -> bool:
        """Whether tokenizer and chat template agree too, as in an export of this package."""
        return self.holds and self.ids_equal and self.template == "equal"

    def __str__(self) -> str:
        equal = {True: "equal", False: "DIFFERENT"}
        return (
            f"transformers and our model, fp32, {self.questions} questions: "
            f"ids {'equal' if self.ids_equal else 'of its tokenizer DIFFERENT'}, pixels {equal[self.pixels_equal]}, "
            f"greedy answers {equal[self.greedy_equal]}, largest difference of a logit {self.max_logit_diff:.3g} "
            f"(accepted: {self.accepted_logit_diff:.3g}, for logits up to {self.logit_scale:.3g}); "
            f"chat template {self.template}"
        )


def compare_single_process(checkpoint: Path, export: Path, *, questions: Sequence[Question]) -> Agreement:
    """Run `compare` in a process group of this process alone."""
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=600),
        open_mesh(Layout(), device=device) as mesh,
    ):
        return compare(checkpoint, export, questions=questions, mesh=mesh)


def compare(
    checkpoint: Path, export: Path, *, questions: Sequence[Question], mesh: Mesh, max_new_tokens: int = MAX_NEW_TOKENS
) -> Agreement:
    """Give both models the same ids and images in fp32 and compare. `mesh` has one rank.

    The prompts are our own; what the export's tokenizer and chat template make of the same conversations is compared
    besides. Our weights are rounded to the export's dtypes, so that only the computation is compared. Raises
    ConversionError when transformers reports a missing, unexpected or mismatched tensor in `export`.
    """
    assert mesh.layout.world_size == 1, mesh.layout
    session = Session.open(checkpoint, mesh=mesh, dtype="fp32")
    processor, model = _load(export)
    _round_weights(session, export)
    vision = session.config.model.vision
    ids_equal = pixels_equal = greedy_equal = True
    largest = scale = 0.0
    template = "equal"
    for question in questions:
        prompt = make_prompt(
            session.encoder,
            question.turns,
            image=question.image,
            tokens_per_image=vision.num_features,
            name=question.name,
        )
        text = render_prompt(session.encoder.template, question.turns, has_image=question.image is not None)
        inputs = _process(processor, text, question)
        ids_equal &= torch.equal(inputs["input_ids"][0], _transformers_ids(prompt, model))
        if template == "equal":
            template = _compare_template(processor, text, question, name=session.encoder.template.name)
        if question.image is not None:
            pixels_equal &= torch.equal(
                inputs["pixel_values"], normalise(prompt.pixels, dtype=torch.float32, vision=vision)
            )
        actual, reference = both_logits(session, model, prompt)
        largest, scale = max(largest, largest_difference(actual, reference)), max(scale, float(actual.abs().max()))
        greedy_equal &= (
            _generate_greedy(model, session, _model_inputs(prompt, model, vision=vision), max_new_tokens)
            == session.answer_ids([question], max_new_tokens=max_new_tokens)[0]
        )
    return Agreement(
        questions=len(questions),
        ids_equal=ids_equal,
        pixels_equal=pixels_equal,
        greedy_equal=greedy_equal,
        max_logit_diff=largest,
        logit_scale=scale,
        template=template,
    )


def generated_questions() -> list[Question]:
    """Questions about a square, a wide and a high generated picture, and a dialogue without a picture."""
    result = []
    for number, (text, (height, width)) in enumerate(zip(_QUESTIONS, _SIZES)):
        turn = Turn("human", f"{IMAGE_PLACEHOLDER}\n{text}")
        picture = encode_png(_picture(number, height=height, width=width))
        result.append(Question(turns=(turn,), image=picture, name=f"generated {number}"))
    rounds = (Turn("human", "Who are you?"), Turn("gpt", "An assistant."), Turn("human", "What can you do?"))
    return [*result, Question(turns=rounds, image=None, name="generated, text only")]


def _picture(number: int, *, height: int, width: int) -> np.ndarray:
    """Draw [height, width, 3] uint8 pixels: a disc on a colour gradient with noise, a pure function of `number`."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([2 * rows, 2 * columns, np.full_like(rows, 60 + 40 * number)], axis=-1)
    disc = (rows - height // 3) ** 2 + (columns - width // 2) ** 2 < (height // 5) ** 2
    pixels[disc] = np.roll((240, 60, 120), number)
    noise = np.random.default_rng(number).integers(-6, 7, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _load(export: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise OpsError(
            f"transformers is needed to compare logits and is not installed ({error}); install transformers 4.57 or "
            "later"
        ) from error
    try:
        processor = AutoProcessor.from_pretrained(str(export), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{export}: transformers cannot load its processor ({error}); copy the model's processor and "
            "tokenizer files beside its weights"
        ) from error
    model, report = AutoModelForImageTextToText.from_pretrained(
        str(export), local_files_only=True, dtype=torch.float32, output_loading_info=True, attn_implementation="sdpa"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ConversionError(
                f"{export}: transformers finds {kind.replace('_', ' ')}: "
                f"{', '.join(map(str, sorted(report[kind])[:5]))}"
            )
    return processor, model.eval()


@torch.no_grad()
def _round_weights(session: Session, export: Path) -> None:
    """Round our weights to the dtypes that they have in the export."""
    stored = open_weights_directory(export)
    naming = detect_naming(stored, title="export")
    mappings = weight_mappings(session.config.model, naming=naming)
    dtypes = {mapping.name: stored[mapping.hf_names[0]].dtype for mapping in mappings}
    for shard in iter_shards(session.chunks):
        shard.data.copy_(shard.data.to(dtypes[shard.key]))


def _process(processor: Any, text: str, question: Question) -> dict[str, torch.Tensor]:
    """Encode the text of a prompt and its image with the export's own processor, which adds <s>."""
    images = {} if question.image is None else {"images": [open_rgb(question.image)]}
    return processor(text=text, return_tensors="pt", **images)


def _compare_template(processor: Any, text: str, question: Question, *, name: str) -> str:
    """Return "equal" when the export's chat template renders `text`, or else what it does."""
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        return f"missing: the prompts are the checkpoint's, of template {name}"
    try:
        rendered = processor.apply_chat_template(to_messages(question), add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        return f"DIFFERENT from the checkpoint's template {name}: it cannot render {question.name!r} ({error})"
    rendered = rendered.removeprefix(processor.tokenizer.bos_token or "")
    if rendered == text:
        return "equal"
    return f"DIFFERENT from the checkpoint's template {name}: {rendered!r} in place of {text!r}"


def to_messages(question: Question) -> list[dict[str, Any]]:
    """Convert a conversation with its image to the messages of transformers' processors."""
    messages = []
    for turn in question.turns:
        text = turn.text.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if text != turn.text:
            assert question.image is not None, question.name
            parts.insert(0, {"type": "image", "image": open_rgb(question.image)})
        messages.append({"role": "user" if turn.role == "human" else "assistant", "content": parts})
    return messages


def _model_inputs(prompt: Prompt, model: Any, *, vision: VisionConfig) -> dict[str, torch.Tensor]:
    """Return the inputs of transformers' model for a prompt: ids, mask and pixels."""
    ids = _transformers_ids(prompt, model).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pixels.size(0):
        inputs["pixel_values"] = normalise(prompt.pixels, dtype=torch.float32, vision=vision)
    return inputs


def largest_difference(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest absolute difference; infinite when a value is NaN."""
    difference = float((actual - reference).abs().max())
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def both_logits(session: Session, model: Any, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the [L, V] logits of our model and of transformers' model, of the same ids and pixels."""
    actual = compute_logits(session, prompt)
    inputs = _model_inputs(prompt, model, vision=session.config.model.vision)
    return actual, model(**inputs).logits[0, :, : actual.shape[1]]


@torch.no_grad()
def compute_logits(session: Session, prompt: Prompt) -> torch.Tensor:
    """Compute our [L, V] logits, without the padding of the vocabulary."""
    batch = Batch(
        token_ids=prompt.token_ids.unsqueeze(0),
        image_slots=prompt.image_slots,
        pixels=prompt.pixels,
        target_rows=torch.arange(prompt.token_ids.numel()),
        targets=None,
    )
    model = unwrap_model(session.chunks[0])
    assert isinstance(model, Share4V), type(model)
    return model.forward_logits(batch)[:, : session.config.model.language.vocab_size]


def _transformers_ids(prompt: Prompt, model: Any) -> torch.Tensor:
    """Replace the ids of the image slots by transformers' image token."""
    return prompt.token_ids.index_fill(0, prompt.image_slots, model.config.image_token_id)


@torch.no_grad()
def _generate_greedy(model: Any, session: Session, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[int]:
    """Generate greedily with transformers and return the new ids before the end of the answer.

    Rows beyond the tokenizer's tokens are no answers: the session never generates them, and transformers does not here.
    """
    rows = range(session.encoder.tokenizer.vocab_size, model.get_output_embeddings().weight.size(0))
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, suppress_tokens=list(rows) or None
    )[0, inputs["input_ids"].shape[1] :].tolist()
    ends = [place for place, token in enumerate(output) if token in session.encoder.stop_ids]
    return output[: ends[0]] if ends else output
