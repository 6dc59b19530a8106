"""The micro-batches of a rank, step by step: the plan says which samples, workers read, encode and collate them, in order.

A sample that cannot be read does not stop the stream: its slot is kept and the failure reported beside the batch (quarantine.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from megatron_share4v.data.images.decoder import Backend, Decoder, open_decoder
from megatron_share4v.data.images.policy import mean_colour_images
from megatron_share4v.data.loading.collate import StageRole, collate
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.loading.workers import ordered_map
from megatron_share4v.data.records import Batch, Example, Sample
from megatron_share4v.data.sampling.blend import BlendedIndex, BlendedSampleReader, open_sample_reader
from megatron_share4v.data.sampling.sampler import MicroBatch, Sampler
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.quarantine import Fault, masked, stand_in
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import DataError

__all__ = ["ImageSharding", "LoadedMicroBatch", "Loader", "LoaderOptions", "StageRole"]

EMPTY_BATCH = Batch(token_ids=None, image_slots=None, pixels=None, target_rows=None, targets=None)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How samples are read; what is read does not depend on it, but for the pixels of an image_backend other than pil.

    prefetch: micro-batches that each worker keeps ready. worker_timeout_s: a worker that gives nothing for so long is started again.
    device_index: the GPU that `dali` decodes on, in this process; None: decoding is done on the CPU, by the workers.
    """

    num_workers: int = 0
    prefetch: int = 2
    worker_timeout_s: float | None = None
    image_backend: Backend = "pil"
    device_index: int | None = None

    @property
    def decodes_in_rank(self) -> bool:
        """Whether workers hand on encoded images."""
        return self.image_backend == "dali" and self.device_index is not None


@dataclass(frozen=True)
class ImageSharding:
    """Of each micro-batch's images, a rank decodes number `rank`, `rank + size`, ...; the text is read by rank 0 alone."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class LoadedMicroBatch:
    """One micro-batch as one rank has read it; faults: the samples of it that could not be read, already replaced.

    batch.pixels are this rank's share of the images.
    """

    batch: Batch
    faults: tuple[Fault, ...] = ()
    files: tuple[bytes, ...] = field(default=(), repr=False)
    """Encoded images on their way from a worker to a decoder in the rank's process; their samples are `owners`."""
    owners: tuple[SampleRequest, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class SampleRequest:
    """One sample of a request, and what the index says of it. name: `shard:key`; room: positions that the plan has for it."""

    row: int
    name: str
    text_length: int
    has_image: bool
    room: int


@dataclass(frozen=True)
class MicroBatchRequest:
    micro_batch: MicroBatch
    samples: tuple[SampleRequest, ...]


class Loader:
    """What one rank of a data-parallel replica reads."""

    def __init__(
        self,
        index: Index | BlendedIndex,
        plan: Sampler,
        encoder: Encoder,
        *,
        role: StageRole,
        data_rank: int,
        data_size: int,
        options: LoaderOptions = LoaderOptions(),
        share: ImageSharding = ImageSharding(),
    ) -> None:
        """The first stage gets tokens and pixels, the last labels (image bytes are not read).

        Raises ConfigError when the micro-batches of a step cannot be shared by data_size ranks, OpsError when the backend is not installed.
        """
        self._count = plan.micro_batches_per_rank(data_size=data_size)
        self._index, self._plan, self._options = index, plan, options
        self._data_rank, self._data_size = data_rank, data_size
        decoder = open_decoder(options.image_backend, encoder.images, device_index=options.device_index)
        self._decoder = decoder if options.decodes_in_rank and role.first else None
        self._read = _MicroBatchReader(
            store=open_sample_reader(index),
            encoder=encoder,
            role=role,
            tokens_per_image=plan.tokens_per_image,
            share=share,
            backend=None if options.decodes_in_rank else options.image_backend,
        )

    def steps(self, start: int, stop: int, *, without: Container[int] = ()) -> Iterator[list[LoadedMicroBatch]]:
        """For each step in [start, stop) that is not in `without`: this rank's micro-batches, in the order in which they are run.

        What is yielded depends neither on the number of workers nor on where reading started.
        """
        options, read = self._options, self._read
        wanted = [step for step in range(start, stop) if step not in without]
        stream = ordered_map(
            read,
            (request for step in wanted for request in self._requests(step)),
            num_workers=options.num_workers,
            prefetch=options.prefetch,
            timeout_s=options.worker_timeout_s,
            lost=read.lost,
        )
        try:
            for _ in wanted:
                yield [self._decoded(next(stream)) for _ in range(self._count)]
        finally:
            stream.close()
            read.store.close()

    def without_labels(self, batch: Batch, micro_batch: MicroBatch, *, rows: frozenset[int]) -> Batch:
        """`batch` with the labels of `rows` masked: other ranks could not read these samples. Its text is read again."""
        again = self._read.labels(self._request(micro_batch), mask=rows)
        return replace(batch, target_rows=again.target_rows, targets=again.targets)

    def _requests(self, step: int) -> Iterator[MicroBatchRequest]:
        items = self._plan.global_batch(step)
        for micro_batch in self._plan.micro_batches(items, data_rank=self._data_rank, data_size=self._data_size):
            yield self._request(micro_batch)

    def _request(self, micro_batch: MicroBatch) -> MicroBatchRequest:
        entries = self._index.rows[list(micro_batch.rows)]
        if micro_batch.segments is None:
            rooms = [micro_batch.sequence_length] * len(entries)
        else:
            rooms = [length for lengths in micro_batch.segments for length in lengths]
        known = zip(micro_batch.rows, entries["n_tok"].tolist(), entries["n_img"].tolist(), rooms)
        samples = tuple(
            SampleRequest(row, _name(self._index, row), length, bool(images), room)
            for row, length, images, room in known
        )
        return MicroBatchRequest(micro_batch, samples)

    def _decoded(self, reading: LoadedMicroBatch) -> LoadedMicroBatch:
        """With a decoder in this process: the pixels of the files that a worker has read."""
        if self._decoder is None:
            return reading
        decoded = self._decoder.decode_batch(reading.files)
        faults = {fault.row: fault for fault in reading.faults}
        _add_failures(faults, decoded.failures, reading.owners)
        return LoadedMicroBatch(replace(reading.batch, pixels=decoded.pixels), tuple(faults.values()))


@dataclass(frozen=True)
class _MicroBatchReader:
    """Request -> Reading; what a worker runs. backend None: files are handed on undecoded."""

    store: SampleReader | BlendedSampleReader
    encoder: Encoder
    role: StageRole
    tokens_per_image: int
    share: ImageSharding
    backend: Backend | None

    @cached_property
    def decoder(self) -> Decoder:
        """Opened in the process that uses it."""
        assert self.backend is not None
        return open_decoder(self.backend, self.encoder.images)

    def __call__(self, request: MicroBatchRequest) -> LoadedMicroBatch:
        faults: dict[int, Fault] = {}
        owners = self._owners(request)
        examples, files = [], []
        for number, wanted in enumerate(request.samples):
            is_ours = number in owners
            if is_ours or self.share.rank == 0:
                sample = self._sample(wanted, with_image=is_ours, faults=faults)
                if is_ours:
                    files.append((sample.image if sample else None) or b"")
                if self.share.rank == 0:
                    examples.append(self._example(wanted, sample, faults=faults))
        ours = tuple(owners.values())
        pixels = None
        if self.role.first and self.backend is not None:
            decoded = self.decoder.decode_batch(files)
            pixels, files = decoded.pixels, []
            _add_failures(faults, decoded.failures, ours)
        batch = self._collate(request, examples, mask=frozenset(faults)) if self.share.rank == 0 else EMPTY_BATCH
        return LoadedMicroBatch(replace(batch, pixels=pixels), tuple(faults.values()), tuple(files), ours)

    def lost(self, request: MicroBatchRequest, reason: str) -> LoadedMicroBatch:
        """What stands for a micro-batch that ends every process that reads it."""
        faults = tuple(
            Fault(wanted.row, wanted.name, f"{reason} while it read this sample's micro-batch")
            for wanted in request.samples
        )
        examples = [
            stand_in(wanted.name, text_length=wanted.text_length, has_image=wanted.has_image)
            for wanted in request.samples
        ]
        batch = self._collate(request, examples, mask=frozenset()) if self.share.rank == 0 else EMPTY_BATCH
        owners = tuple(self._owners(request).values())
        pixels = mean_colour_images(len(owners), self.encoder.images) if self.role.first else None
        return LoadedMicroBatch(replace(batch, pixels=pixels), faults, tuple(b"" for _ in owners), owners)

    def labels(self, request: MicroBatchRequest, *, mask: frozenset[int]) -> Batch:
        """The text of a request alone, with the labels of the rows `mask` left out."""
        faults: dict[int, Fault] = {}
        examples = [
            self._example(wanted, self._sample(wanted, with_image=False, faults=faults), faults=faults)
            for wanted in request.samples
        ]
        return self._collate(request, examples, mask=mask | frozenset(faults))

    def _owners(self, request: MicroBatchRequest) -> dict[int, SampleRequest]:
        """The samples whose image this rank decodes, by their place in the request."""
        if not self.role.first:
            return {}
        with_image = [(number, wanted) for number, wanted in enumerate(request.samples) if wanted.has_image]
        return dict(with_image[self.share.rank :: self.share.size])

    def _sample(self, wanted: SampleRequest, *, with_image: bool, faults: dict[int, Fault]) -> Sample | None:
        try:
            return self.store.read(wanted.row, with_image=with_image)
        except DataError as error:
            faults.setdefault(wanted.row, Fault(wanted.row, wanted.name, str(error)))
            # The text may be whole though the image is not.
            return self._sample(wanted, with_image=False, faults=faults) if with_image else None

    def _example(self, wanted: SampleRequest, sample: Sample | None, *, faults: dict[int, Fault]) -> Example:
        try:
            if sample is not None:
                return self._encoded(wanted, sample)
        except DataError as error:
            faults.setdefault(wanted.row, Fault(wanted.row, wanted.name, str(error)))
        return stand_in(wanted.name, text_length=wanted.text_length, has_image=wanted.has_image)

    def _encoded(self, wanted: SampleRequest, sample: Sample) -> Example:
        example = self.encoder.encode(sample, with_pixels=False)
        positions = len(example.input_ids) + wanted.has_image * (self.tokens_per_image - 1)
        if positions > wanted.room or sample.has_image != wanted.has_image:
            raise DataError(
                f"{wanted.name}: takes {positions} positions, the plan has {wanted.room} for it: the index does not describe this sample; "
                "prepare the data set again"
            )
        return example

    def _collate(self, request: MicroBatchRequest, examples: Sequence[Example], *, mask: frozenset[int]) -> Batch:
        # Pixels of no size: how many images there are is checked here, the images themselves are decoded together and put in later.
        counted = [
            replace(
                masked(example) if wanted.row in mask else example,
                pixels=torch.empty(int(wanted.has_image), 0, 0, 3, dtype=torch.uint8),
            )
            for wanted, example in zip(request.samples, examples)
        ]
        micro_batch = request.micro_batch
        return collate(
            counted,
            sequence_length=micro_batch.sequence_length,
            tokens_per_image=self.tokens_per_image,
            role=self.role,
            segments=micro_batch.segments,
        )


def _add_failures(faults: dict[int, Fault], failures: dict[int, str], owners: Sequence[SampleRequest]) -> None:
    for position, reason in failures.items():
        wanted = owners[position]
        faults.setdefault(wanted.row, Fault(wanted.row, wanted.name, reason))


def _name(index: Index | BlendedIndex, row: int) -> str:
    """`shard:key`; in a blend with its source in front."""
    if isinstance(index, BlendedIndex):
        part, local = index.locate(row)
        return f"{index.parts[part].name}/{_name(index.parts[part].index, local)}"
    return f"{index.info.shards[int(index.rows[row]['shard'])].name}:{index.key(row)}"
