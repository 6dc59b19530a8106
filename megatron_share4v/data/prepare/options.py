"""Options of a preparation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.text.template_format import TrainedMarkers
from megatron_share4v.text.tokenizer_config import TokenizerRule


@dataclass(frozen=True)
class PrepareOptions:
    """Options of a preparation.

    tokenizer_rule: how text after a special token is tokenised; None: as the files beside the tokenizer say.
    trained_markers: as data.trained_markers of a run. max_text_length: positions kept per sample, an image counted as
    one. workers: reader processes, 0: this process. in_place: leave the images where they are. repeat_images: store an
    image with each of its samples, for readers without our index; else once. restart: discard an unfinished
    preparation.
    """

    annotations: Path
    images: Path
    output: Path
    tokenizer: Path
    tokenizer_rule: TokenizerRule | None = None
    template: str = "vicuna_v1"
    trained_markers: TrainedMarkers = "answer_only"
    max_text_length: int = 2048
    samples_per_shard: int = 10_000
    max_rejected_fraction: float = 0.05
    workers: int = 0
    in_place: bool = False
    repeat_images: bool = False
    overwrite: bool = False
    restart: bool = False
