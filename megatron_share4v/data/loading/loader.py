"""Loader of a rank's micro-batches, step by step: the sampler chooses samples, workers read, encode and collate them.

An unreadable sample does not stop the stream: its slot is kept and the failure reported beside the batch
(quarantine.py).
"""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from megatron_share4v.data.images.decoder import Backend, Decoder, open_decoder
from megatron_share4v.data.images.pixels import mean_colour_images
from megatron_share4v.data.loading.collate import StageRole, collate
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.loading.workers import ordered_map
from megatron_share4v.data.records import Batch, Example, Sample
from megatron_share4v.data.sampling.blend import BlendedIndex, BlendedSampleReader, open_sample_reader
from megatron_share4v.data.sampling.sampler import MicroBatch, Sampler
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.quarantine import Fault, mask_labels, placeholder_example
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import DataError

__all__ = ["ImageSharding", "LoadedMicroBatch", "Loader", "LoaderOptions", "StageRole"]

EMPTY_BATCH = Batch(token_ids=None, image_slots=None, pixels=None, target_rows=None, targets=None)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Reader settings; they do not change what is read, except the pixels of an image_backend other than pil.

    prefetch: micro-batches that each worker keeps ready.
    worker_timeout_s: a worker without a result for so long is restarted.
    device_index: the GPU on which `dali` decodes, in this process; None: workers decode on the CPU.
    """

    num_workers: int = 0
    prefetch: int = 2
    worker_timeout_s: float | None = None
    image_backend: Backend = "pil"
    device_index: int | None = None

    @property
    def decodes_in_main_process(self) -> bool:
        """Whether workers return encoded images and this process decodes them."""
        return self.image_backend == "dali" and self.device_index is not None


@dataclass(frozen=True)
class ImageSharding:
    """Split of each micro-batch's images over ranks: a rank decodes images `rank`, `rank + size`, ...

    Only rank 0 reads the text.
    """

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class LoadedMicroBatch:
    """One micro-batch as read by one rank.

    batch: its `pixels` are the images that this rank decodes.
    faults: unreadable samples, already replaced in `batch`.
    """

    batch: Batch
    faults: tuple[Fault, ...] = ()
    files: tuple[bytes, ...] = field(default=(), repr=False)
    """Encoded images that the main process decodes; their samples are `owners`."""
    owners: tuple[SampleRequest, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class SampleRequest:
    """One sample to read, with its index entry.

    name: `shard:key`; reserved: positions that the sampler reserved for it.
    """

    row: int
    name: str
    text_length: int
    has_image: bool
    reserved: int


@dataclass(frozen=True)
class MicroBatchRequest:
    """Work item of a reader process: one micro-batch and its samples."""

    micro_batch: MicroBatch
    samples: tuple[SampleRequest, ...]


class Loader:
    """Reader of the micro-batches of one rank."""

    def __init__(
        self,
        index: Index | BlendedIndex,
        sampler: Sampler,
        encoder: Encoder,
        *,
        role: StageRole,
        data_rank: int,
        data_size: int,
        options: LoaderOptions = LoaderOptions(),
        image_sharding: ImageSharding = ImageSharding(),
    ) -> None:
        """Open the data set; the first stage reads tokens and pixels, the last labels (without image bytes).

        Raises ConfigError when the micro-batches of a step do not divide by data_size, OpsError when the image backend
        is not installed.
        """
        self._count = sampler.micro_batches_per_rank(data_size=data_size)
        self._index, self._sampler, self._options = index, sampler, options
        self._data_rank, self._data_size = data_rank, data_size
        decoder = open_decoder(options.image_backend, encoder.images, device_index=options.device_index)
        self._decoder = decoder if options.decodes_in_main_process and role.first else None
        self._read = _MicroBatchReader(
            samples=open_sample_reader(index),
            encoder=encoder,
            role=role,
            tokens_per_image=sampler.tokens_per_image,
            image_sharding=image_sharding,
            backend=None if options.decodes_in_main_process else options.image_backend,
        )

    def steps(
        self, start: int, stop: int, *, skip: Container[int] = ()
    ) -> Generator[list[LoadedMicroBatch], None, None]:
        """Yield this rank's micro-batches of each step in [start, stop) that is not in `skip`, in execution order.

        The result depends neither on the number of workers nor on where reading started.
        """
        options, read = self._options, self._read
        steps = [step for step in range(start, stop) if step not in skip]
        stream = ordered_map(
            read,
            (request for step in steps for request in self._requests(step)),
            num_workers=options.num_workers,
            prefetch=options.prefetch,
            timeout_s=options.worker_timeout_s,
            on_crash=read.failed_micro_batch,
        )
        try:
            for _ in steps:
                yield [self._decode(next(stream)) for _ in range(self._count)]
        finally:
            stream.close()
            read.samples.close()

    def mask_samples(self, batch: Batch, micro_batch: MicroBatch, *, rows: frozenset[int]) -> Batch:
        """Mask the labels of `rows` in `batch`, after other ranks failed to read these samples.

        The text of the micro-batch is read again.
        """
        reread = self._read.text_batch(self._request(micro_batch), mask=rows)
        return replace(batch, target_rows=reread.target_rows, targets=reread.targets)

    def _requests(self, step: int) -> Iterator[MicroBatchRequest]:
        batch = self._sampler.global_batch(step)
        for micro_batch in self._sampler.micro_batches(batch, data_rank=self._data_rank, data_size=self._data_size):
            yield self._request(micro_batch)

    def _request(self, micro_batch: MicroBatch) -> MicroBatchRequest:
        entries = self._index.rows[list(micro_batch.rows)]
        if micro_batch.segments is None:
            reserved = [micro_batch.sequence_length] * len(entries)
        else:
            reserved = [length for lengths in micro_batch.segments for length in lengths]
        known = zip(micro_batch.rows, entries["n_tok"].tolist(), entries["n_img"].tolist(), reserved)
        samples = tuple(
            SampleRequest(row, _sample_name(self._index, row), length, bool(images), room)
            for row, length, images, room in known
        )
        return MicroBatchRequest(micro_batch, samples)

    def _decode(self, reading: LoadedMicroBatch) -> LoadedMicroBatch:
        """Decode the files that a worker has read, when this process holds the decoder."""
        if self._decoder is None:
            return reading
        decoded = self._decoder.decode_batch(reading.files)
        faults = {fault.row: fault for fault in reading.faults}
        _add_failures(faults, decoded.failures, reading.owners)
        return LoadedMicroBatch(replace(reading.batch, pixels=decoded.pixels), tuple(faults.values()))


@dataclass(frozen=True)
class _MicroBatchReader:
    """Callable that reads one micro-batch; runs in a worker. backend None: files are returned encoded."""

    samples: SampleReader | BlendedSampleReader
    encoder: Encoder
    role: StageRole
    tokens_per_image: int
    image_sharding: ImageSharding
    backend: Backend | None

    @cached_property
    def decoder(self) -> Decoder:
        """Decoder, opened in the process that uses it."""
        assert self.backend is not None
        return open_decoder(self.backend, self.encoder.images)

    def __call__(self, request: MicroBatchRequest) -> LoadedMicroBatch:
        faults: dict[int, Fault] = {}
        owners = self._images_to_decode(request)
        examples, files = [], []
        for number, item in enumerate(request.samples):
            is_local = number in owners
            if is_local or self.image_sharding.rank == 0:
                sample = self._sample(item, with_image=is_local, faults=faults)
                if is_local:
                    files.append((sample.image if sample else None) or b"")
                if self.image_sharding.rank == 0:
                    examples.append(self._example(item, sample, faults=faults))
        local = tuple(owners.values())
        pixels = None
        if self.role.first and self.backend is not None:
            decoded = self.decoder.decode_batch(files)
            pixels, files = decoded.pixels, []
            _add_failures(faults, decoded.failures, local)
        batch = (
            self._collate(request, examples, mask=frozenset(faults)) if self.image_sharding.rank == 0 else EMPTY_BATCH
        )
        return LoadedMicroBatch(replace(batch, pixels=pixels), tuple(faults.values()), tuple(files), local)

    def failed_micro_batch(self, request: MicroBatchRequest, reason: str) -> LoadedMicroBatch:
        """Placeholder for a micro-batch that crashed every process that read it; all its samples are faults."""
        faults = tuple(
            Fault(item.row, item.name, f"{reason} while it read this sample's micro-batch") for item in request.samples
        )
        examples = [
            placeholder_example(item.name, text_length=item.text_length, has_image=item.has_image)
            for item in request.samples
        ]
        batch = self._collate(request, examples, mask=frozenset()) if self.image_sharding.rank == 0 else EMPTY_BATCH
        owners = tuple(self._images_to_decode(request).values())
        pixels = mean_colour_images(len(owners), self.encoder.images) if self.role.first else None
        return LoadedMicroBatch(replace(batch, pixels=pixels), faults, tuple(b"" for _ in owners), owners)

    def text_batch(self, request: MicroBatchRequest, *, mask: frozenset[int]) -> Batch:
        """Read the text of a request, with the labels of the rows in `mask` masked."""
        faults: dict[int, Fault] = {}
        examples = [
            self._example(item, self._sample(item, with_image=False, faults=faults), faults=faults)
            for item in request.samples
        ]
        return self._collate(request, examples, mask=mask | frozenset(faults))

    def _images_to_decode(self, request: MicroBatchRequest) -> dict[int, SampleRequest]:
        """Samples whose image this rank decodes, by position in the request."""
        if not self.role.first:
            return {}
        with_image = [(number, item) for number, item in enumerate(request.samples) if item.has_image]
        return dict(with_image[self.image_sharding.rank :: self.image_sharding.size])

    def _sample(self, item: SampleRequest, *, with_image: bool, faults: dict[int, Fault]) -> Sample | None:
        try:
            return self.samples.read(item.row, with_image=with_image)
        except DataError as error:
            faults.setdefault(item.row, Fault(item.row, item.name, str(error)))
            # The text may be readable although the image is not.
            return self._sample(item, with_image=False, faults=faults) if with_image else None

    def _example(self, item: SampleRequest, sample: Sample | None, *, faults: dict[int, Fault]) -> Example:
        try:
            if sample is not None:
                return self._encode(item, sample)
        except DataError as error:
            faults.setdefault(item.row, Fault(item.row, item.name, str(error)))
        return placeholder_example(item.name, text_length=item.text_length, has_image=item.has_image)

    def _encode(self, item: SampleRequest, sample: Sample) -> Example:
        example = self.encoder.encode(sample, with_pixels=False)
        positions = len(example.input_ids) + item.has_image * (self.tokens_per_image - 1)
        if positions > item.reserved or sample.has_image != item.has_image:
            raise DataError(
                f"{item.name}: takes {positions} positions, {item.reserved} reserved by the sampler: "
                "the index does not match this sample; prepare the data set again"
            )
        return example

    def _collate(self, request: MicroBatchRequest, examples: Sequence[Example], *, mask: frozenset[int]) -> Batch:
        # Pixels of zero size: collate checks the number of images; the images are decoded in one batch and added later.
        counted = [
            replace(
                mask_labels(example) if item.row in mask else example,
                pixels=torch.empty(int(item.has_image), 0, 0, 3, dtype=torch.uint8),
            )
            for item, example in zip(request.samples, examples)
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
    """Record a fault for each image that could not be decoded."""
    for position, reason in failures.items():
        item = owners[position]
        faults.setdefault(item.row, Fault(item.row, item.name, reason))


def _sample_name(index: Index | BlendedIndex, row: int) -> str:
    """`shard:key`; in a blend `source/shard:key`."""
    if isinstance(index, BlendedIndex):
        number, local = index.locate(row)
        member = index.members[number]
        return f"{member.name}/{_sample_name(member.index, local)}"
    return f"{index.info.shards[int(index.rows[row]['shard'])].name}:{index.key(row)}"
