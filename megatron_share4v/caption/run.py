"""Captions from a local model: the images of a job as engine tasks, on all ranks of the world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_share4v.caption.job import JobOptions, JobSummary, run_job
from megatron_share4v.caption.records import CaptionRow, CaptionSettings, ImageEntry
from megatron_share4v.data.loading.prompt import Prompt, make_prompt
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import ConfigError
from megatron_share4v.infer.batch_generate import GenerationTask, generate_stream
from megatron_share4v.infer.beam_search import BeamSearchEngine
from megatron_share4v.infer.data_parallel import Replica, open_replica
from megatron_share4v.infer.request import SamplingParams
from megatron_share4v.parallel.launch import World
from megatron_share4v.text.template import IMAGE_PLACEHOLDER


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model to caption with.

    name: checkpoint, run directory or export directory. tensor: TP ranks per replica. dtype None: as trained.
    """

    name: str
    batch_size: int = 16
    tensor: int = 1
    dtype: str | None = None
    workers: int = 4


def caption_with_model(
    model: ModelOptions, job: JobOptions, *, settings: CaptionSettings, world: World
) -> JobSummary | None:
    """Caption `job` with a local model: see run_job. Raises ConfigError, CheckpointError, DataError."""
    if world.size % model.tensor:
        raise ConfigError(
            f"--num_gpus {model.tensor} spreads one model over {model.tensor} processes, and {world.size} are "
            f"running; start with torchrun --nproc-per-node {model.tensor} tools/caption.py ..., or a multiple of it "
            "to caption with several models at once"
        )
    if not Path(model.name).exists():
        raise ConfigError(
            f"--model-name {model.name}: no such directory; give a checkpoint, a run directory or an export of "
            "tools/convert.py. (The published ShareCaptioner has another architecture and cannot be loaded; a model "
            "trained here takes the same files and options.)"
        )
    requests = model.batch_size * settings.num_beams
    with open_replica(
        Path(model.name), tensor=model.tensor, max_requests=requests, dtype=model.dtype, world=world
    ) as replica:
        if replica is None:
            return None
        captioner = LocalCaptioner(replica, settings=settings, workers=model.workers)
        return run_job(captioner, job, settings=settings, model=replica.name, share=replica.share)


class LocalCaptioner:
    """Yields rows as they finish, in any order; images are consumed only as needed."""

    def __init__(self, replica: Replica, *, settings: CaptionSettings, workers: int) -> None:
        self._session, self._settings, self._workers = replica.session, settings, workers
        self._engine = (
            replica.engine if settings.num_beams == 1 else BeamSearchEngine(replica.engine, beams=settings.num_beams)
        )
        self._turns = (Turn("human", f"{IMAGE_PLACEHOLDER}\n{settings.prompt}"),)

    def __call__(self, pictures: Iterator[ImageEntry]) -> Iterator[list[CaptionRow]]:
        """Caption images. Raises DataError when prompt and longest caption exceed the context, as for every image."""
        paths: dict[str, str] = {}

        def tasks() -> Iterator[GenerationTask]:
            for picture in pictures:
                paths[picture.id] = picture.path
                yield GenerationTask(picture.id, partial(self._prompt, picture), self._sampling(picture))

        for outcomes in generate_stream(
            self._engine, tasks(), tokenizer=self._session.encoder.tokenizer, workers=self._workers
        ):
            yield [
                CaptionRow(
                    o.id, paths.pop(o.id), caption=o.text, tokens=o.tokens, finish_reason=o.finish_reason, error=o.error
                )
                for o in outcomes
            ]

    def _prompt(self, picture: ImageEntry) -> Prompt:
        patches = self._session.config.model.vision.num_features
        return make_prompt(
            self._session.encoder, self._turns, image=picture.read(), tokens_per_image=patches, name=picture.path
        )

    def _sampling(self, picture: ImageEntry) -> SamplingParams:
        given = self._settings
        return SamplingParams(
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            top_p=given.top_p,
            repetition_penalty=given.repetition_penalty,
            seed=given.seed_of(picture),
        )
