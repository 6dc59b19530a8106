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

from megatron_share4v.checkpoint.hf.reader import read_json
from megatron_share4v.data.images.pil_decoder import encode_png, open_rgb
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.loading.prompt import Prompt, make_prompt
from megatron_share4v.data.records import Batch, Turn
from megatron_share4v.errors import ConversionError, OpsError
from megatron_share4v.infer.session import Question, Session
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.optimizer import unwrap_model
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

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
    pixels_equal: bool
    greedy_equal: bool
    max_logit_diff: float
    """Largest absolute difference over all positions and the V tokens of our vocabulary."""
    logit_scale: float
    """Largest absolute value of our logits."""

    @property
    def accepted_logit_diff(self) -> float:
        """Largest `max_logit_diff` that counts as agreement."""
        return LOGIT_TOLERANCE * max(1.0, self.logit_scale)

    @property
    def holds(self) -> bool:
        """Whether the export and the checkpoint are the same model."""
        return (
            self.ids_equal
            and self.pixels_equal
            and self.greedy_equal
            and self.max_logit_diff <= self.accepted_logit_diff
        )

    def __str__(self) -> str:
        equal = {True: "equal", False: "DIFFERENT"}
        return (
            f"transformers and our model, fp32, {self.questions} questions: "
            f"ids {equal[self.ids_equal]}, pixels {equal[self.pixels_equal]}, "
            f"greedy answers {equal[self.greedy_equal]}, largest difference of a logit {self.max_logit_diff:.3g} "
            f"(accepted: {self.accepted_logit_diff:.3g}, for logits up to {self.logit_scale:.3g})"
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
    """Give both models the same questions in fp32 and compare. `mesh` has one rank.

    Our weights are rounded to the export's dtype, so that only the computation is compared. Raises ConversionError when
    transformers reports a missing, unexpected or mismatched tensor in `export`.
    """
    assert mesh.layout.world_size == 1, mesh.layout
    session = Session.open(checkpoint, mesh=mesh, dtype="fp32")
    processor, model = _load(export)
    _round_weights(session, getattr(torch, read_json(export / "config.json").get("torch_dtype", "float32")))
    patches = session.config.model.vision.num_patches
    ids_equal = pixels_equal = greedy_equal = True
    largest = scale = 0.0
    for question in questions:
        prompt = make_prompt(
            session.encoder, question.turns, image=question.image, tokens_per_image=patches, name=question.name
        )
        inputs = _encode_inputs(processor, question)
        ids_equal &= torch.equal(inputs["input_ids"][0], _transformers_ids(prompt, model))
        if question.image is not None:
            pixels_equal &= torch.equal(inputs["pixel_values"], normalise(prompt.pixels, dtype=torch.float32))
        ours, theirs = _both_logits(session, model, prompt)
        largest, scale = max(largest, _largest_difference(ours, theirs)), max(scale, float(ours.abs().max()))
        greedy_equal &= (
            _generate_greedy(model, session, inputs, max_new_tokens)
            == session.answer_ids([question], max_new_tokens=max_new_tokens)[0]
        )
    return Agreement(
        questions=len(questions),
        ids_equal=ids_equal,
        pixels_equal=pixels_equal,
        greedy_equal=greedy_equal,
        max_logit_diff=largest,
        logit_scale=scale,
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
            f"{export}: transformers cannot load its processor ({error}); logits can only be compared with an export "
            "made by this package"
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
def _round_weights(session: Session, dtype: torch.dtype) -> None:
    for chunk in session.chunks:
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(dtype))


def _encode_inputs(processor: Any, question: Question) -> dict[str, torch.Tensor]:
    """Encode the conversation with the export's own processor and chat template."""
    messages = to_messages(question)
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


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


def logit_difference(session: Session, model: Any, prompt: Prompt) -> float:
    """Return the largest absolute logit difference to transformers' `model` over all L positions and V tokens.

    Both models get the same ids and pixels. The result is infinite when a logit is NaN.
    """
    return _largest_difference(*_both_logits(session, model, prompt))


def _largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = float((ours - theirs).abs().max())
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def _both_logits(session: Session, model: Any, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the [L, V] logits of our model and of transformers' model."""
    ours = compute_logits(session, prompt)
    images = {"pixel_values": normalise(prompt.pixels, dtype=torch.float32)} if prompt.pixels.size(0) else {}
    return ours, model(input_ids=_transformers_ids(prompt, model).unsqueeze(0), **images).logits[0, :, : ours.shape[1]]


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
    """Generate greedily with transformers and return the new ids before </s>."""
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    end = session.encoder.tokenizer.eos_id
    return output[: output.index(end)] if end in output else output
