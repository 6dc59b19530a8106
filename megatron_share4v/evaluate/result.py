"""result.json: the scores and everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_share4v.checkpoint.manifest import library_versions
from megatron_share4v.data.images.pil_decoder import VERSION
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.evaluate.judge import Judgement
from megatron_share4v.evaluate.loaded_benchmark import Evaluation
from megatron_share4v.evaluate.records import Scores
from megatron_share4v.files import atomic_write_text
from megatron_share4v.infer.data_parallel import Replica
from megatron_share4v.remote.openai_client import Endpoint
from megatron_share4v.text.template_format import Template


@dataclass(frozen=True)
class ModelFacts:
    """Identity of the evaluated model.

    name: shown in results. fingerprint: changes with weights and dtype. facts: recorded in result.json.
    images, template: preprocessing of images, and
    conversation template; None where it is not done here.
    """

    name: str
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    images: ImagePolicy | None = None
    template: Template | None = None

    @classmethod
    def of_replica(cls, replica: Replica, *, name: str) -> ModelFacts:
        """Identify a local model by the hashes of its checkpoint and vision tower."""
        facts = {
            "path": str(replica.path),
            "sha256": replica.fingerprint,
            "tower_sha256": replica.session.weights.get("vision"),
            "dtype": replica.dtype,
            "image_size": replica.session.config.model.vision.image_size,
        }
        encoder = replica.session.encoder
        return cls(name, replica.name, facts, encoder.images, encoder.template)

    @classmethod
    def of_answers(cls, path: Path, *, name: str | None) -> ModelFacts:
        """Identify the model of an answer file by the hash of the file."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(name or path.stem, digest, {"answers": str(path), "sha256": digest})

    @classmethod
    def of_endpoint(cls, endpoint: Endpoint, *, name: str | None) -> ModelFacts:
        """Identify a served model by URL and model name."""
        return cls(
            name or endpoint.model,
            f"{endpoint.url} {endpoint.model}",
            {"endpoint": endpoint.url, "model": endpoint.model},
        )


def result_of(
    evaluation: Evaluation, scores: Scores, *, answered: int, model: ModelFacts, judgement: Judgement | None
) -> dict[str, Any]:
    """Build the content of result.json, which published.BenchmarkResult reads.

    answered: number of questions with an answer.
    """
    decoding, first = evaluation.decoding, evaluation.items[0]
    judged = (
        {
            "model": judgement.model,
            "answered_as": judgement.answered_as,
            "seed": judgement.seed,
            "replies": judgement.replies,
        }
        if judgement
        else None
    )
    complete = evaluation.whole and scores.complete and answered == len(evaluation.items)
    headline = None
    if scores.headline is not None:
        headline = {"name": scores.headline, "value": scores.json_values[scores.headline]}
        headline |= {} if complete else {"partial": True}
    template = decoding.prompt_template(model.template)
    return {
        "model": model.name,
        "benchmark": evaluation.task.name,
        "split": evaluation.folder.split,
        "data": str(evaluation.folder.root.resolve()),
        "profile": evaluation.profile.value,
        "headline": headline,
        "scores": scores.json_values,
        "note": scores.note,
        "judge": judged,
        "complete": complete,
        "questions": len(evaluation.items),
        "answered": answered,
        "checkpoint": dict(model.facts),
        "prompt": {
            "template": template.name,
            "system": template.system,
            "first": first.turn,
        },
        "preprocessing": {"image_mode": decoding.image_mode, "decoder": VERSION, **_describe_images(model.images)},
        "decoding": {
            "greedy": True,
            "beams": 1,
            "max_new_tokens": decoding.max_new_tokens,
            "stop": decoding.answer_end(model.template),
        },
        "versions": library_versions(),
    }


def _describe_images(policy: ImagePolicy | None) -> dict[str, Any]:
    """Describe how the tower's images are made. The aspect ratio is not the policy's here: image_mode replaces it."""
    if policy is None:
        return {}
    return {
        "pad_colour": policy.pad_colour,
        "image_mean": policy.image_mean,
        "image_std": policy.image_std,
        "resample": policy.resample,
        "resize": policy.resize,
        "resize_edge": policy.resize_edge,
        "orientation": policy.orientation,
    }


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write result.json atomically."""
    atomic_write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
