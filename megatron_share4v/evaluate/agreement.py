"""Whether transformers computes from an exported model what we compute from its checkpoint: ids, pixels, logits, greedy answers. One process.

The only door to transformers in the package. The export is loaded as a user would: through the Auto classes, offline, from its directory alone.
L positions of a prompt with its image slots, V tokens of our vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_share4v.checkpoint.hf.reader import read_json
from megatron_share4v.data.images.pil_decoder import encode_png, open_rgb
from megatron_share4v.data.images.policy import normalise
from megatron_share4v.data.loading.prompt import Prompt, make_prompt
from megatron_share4v.data.records import Batch, Turn
from megatron_share4v.errors import ConversionError, OpsError
from megatron_share4v.infer.session import Question, Session
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.mcore.optimizer import unwrap_model
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.text.template import IMAGE_PLACEHOLDER

TOKENS = 16
LOGIT_TOLERANCE = 1e-4
"""fp32: sums in another order through a few dozen layers. Absolute for logits up to 1, and relative to the largest one beyond: rounding errors grow with
the values they are made of, and trained models of 32 layers and more have logits of some dozens. bf16 weights are compared in fp32 too."""
_QUESTIONS = (
    "Describe this image in detail.",
    "What is this?\nAnswer  in one word.",
    "What colour is the object on the left?",
)

_SIZES = ((96, 96), (76, 96), (96, 76))  # height and width in pixels, one for each question


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What was found equal over all questions."""

    questions: int
    ids_equal: bool
    pixels_equal: bool
    greedy_equal: bool
    max_logit_diff: float
    """Largest absolute difference over all positions and the V tokens of our vocabulary."""
    logit_scale: float
    """Largest absolute value of ours."""

    @property
    def accepted_logit_diff(self) -> float:
        """How large `max_logit_diff` may be."""
        return LOGIT_TOLERANCE * max(1.0, self.logit_scale)

    @property
    def holds(self) -> bool:
        """Whether the export is the checkpoint's model."""
        return (
            self.ids_equal
            and self.pixels_equal
            and self.greedy_equal
            and self.max_logit_diff <= self.accepted_logit_diff
        )

    def __str__(self) -> str:
        equal = {True: "equal", False: "DIFFERENT"}
        return (
            f"transformers against ours, fp32, {self.questions} questions: ids {equal[self.ids_equal]}, pixels {equal[self.pixels_equal]}, "
            f"greedy answers {equal[self.greedy_equal]}, largest difference of a logit {self.max_logit_diff:.3g} "
            f"(accepted: {self.accepted_logit_diff:.3g}, for logits up to {self.logit_scale:.3g})"
        )


def compare_alone(checkpoint: Path, export: Path, *, questions: Sequence[Question]) -> Agreement:
    """`compare` in a world of this process alone."""
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=600),
        open_mesh(Layout(), device=device) as mesh,
    ):
        return compare(checkpoint, export, questions=questions, mesh=mesh)


def compare(
    checkpoint: Path, export: Path, *, questions: Sequence[Question], mesh: Mesh, max_new_tokens: int = TOKENS
) -> Agreement:
    """Ask both models the same, in fp32. `mesh` has one rank. Ours are rounded as the export's are, so that what is compared is the computation.

    Raises ConversionError when transformers finds a missing, unexpected or mismatched tensor in `export`.
    """
    assert mesh.layout.world_size == 1, mesh.layout
    session = Session.open(checkpoint, mesh=mesh, dtype="fp32")
    processor, model = _load(export)
    _round(session, getattr(torch, read_json(export / "config.json").get("torch_dtype", "float32")))
    patches = session.config.model.vision.num_patches
    ids_equal = pixels_equal = greedy_equal = True
    largest = scale = 0.0
    for question in questions:
        prompt = make_prompt(
            session.encoder, question.turns, image=question.image, tokens_per_image=patches, name=question.name
        )
        inputs = _inputs(processor, question)
        ids_equal &= torch.equal(inputs["input_ids"][0], _their_ids(prompt, model))
        if question.image is not None:
            pixels_equal &= torch.equal(inputs["pixel_values"], normalise(prompt.pixels, dtype=torch.float32))
        ours, theirs = _logits(session, model, prompt)
        largest, scale = max(largest, _largest_difference(ours, theirs)), max(scale, float(ours.abs().max()))
        greedy_equal &= (
            _greedy(model, session, inputs, max_new_tokens)
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
    pixels[disc] = np.roll((240, 60, 90), number)
    noise = np.random.default_rng(number).integers(-6, 7, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _load(export: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise OpsError(
            f"transformers is needed to compare logits and is not installed ({error}); install transformers 4.57 or later"
        ) from error
    try:
        processor = AutoProcessor.from_pretrained(str(export), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{export}: transformers cannot load its processor ({error}); logits are compared with an export of ours"
        ) from error
    model, report = AutoModelForImageTextToText.from_pretrained(
        str(export), local_files_only=True, dtype=torch.float32, output_loading_info=True, attn_implementation="sdpa"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ConversionError(
                f"{export}: transformers finds {kind.replace('_', ' ')}: {', '.join(map(str, sorted(report[kind])[:5]))}"
            )
    return processor, model.eval()


@torch.no_grad()
def _round(session: Session, dtype: torch.dtype) -> None:
    for parameter in (parameter for chunk in session.chunks for parameter in chunk.parameters()):
        parameter.copy_(parameter.to(dtype))


def _inputs(processor: Any, question: Question) -> dict[str, torch.Tensor]:
    """What the export's own processor and chat template make of the conversation."""
    messages = messages_of(question)
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def messages_of(question: Question) -> list[dict[str, Any]]:
    """The conversation as transformers' processors take it, with its picture."""
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
    """Largest absolute difference over all L positions and V tokens between ours and transformers' `model`, from the same ids and pixels.

    Infinite when one of them is not a number.
    """
    return _largest_difference(*_logits(session, model, prompt))


def _largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = float((ours - theirs).abs().max())
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def _logits(session: Session, model: Any, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, V] of ours and of theirs."""
    ours = query(session, prompt)
    images = {"pixel_values": normalise(prompt.pixels, dtype=torch.float32)} if prompt.pixels.size(0) else {}
    return ours, model(input_ids=_their_ids(prompt, model).unsqueeze(0), **images).logits[0, :, : ours.shape[1]]


@torch.no_grad()
def query(session: Session, prompt: Prompt) -> torch.Tensor:
    """[L, V] logits of ours, of the V tokens of our vocabulary alone."""
    rows = torch.arange(prompt.token_ids.numel())
    given = {
        "token_ids": prompt.token_ids.unsqueeze(0),
        "image_slots": prompt.image_slots,
        "pixels": prompt.pixels,
        "target_rows": rows,
    }
    batch = Batch(**{**{field.name: None for field in fields(Batch)}, **given})
    return unwrap_model(session.chunks[0]).query(batch)[:, : session.config.model.language.vocab_size]


def _their_ids(prompt: Prompt, model: Any) -> torch.Tensor:
    """Our ids with their image token at the slots."""
    return prompt.token_ids.index_fill(0, prompt.image_slots, model.config.image_token_id)


@torch.no_grad()
def _greedy(model: Any, session: Session, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[int]:
    """The new ids up to and without </s>."""
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    end = session.encoder.tokenizer.eos_id
    return output[: output.index(end)] if end in output else output
