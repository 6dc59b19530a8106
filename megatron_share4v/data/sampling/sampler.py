"""Sampler: the samples of each optimizer step, cut into micro-batches with known sequence lengths; pure arithmetic.

An item fills one sequence: a sample, or a pack of samples. Epochs follow each other without a gap: step k takes items
[k G, (k + 1) G) of the endless sequence. Every rank computes the same result, so all pipeline stages know all shapes,
and where samples begin in a pack, without communication. G global batch, M micro-batches of a step, S sequence length.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_share4v.config.run import RunConfig
from megatron_share4v.data.sampling.blend import BlendedIndex, SourceRows, source_rows
from megatron_share4v.data.sampling.orders import block_order, modality_length_order, random_order, select_items
from megatron_share4v.data.sampling.packing import Packing, Packs, concatenate_packs, pack_samples
from megatron_share4v.data.store.index import Index
from megatron_share4v.errors import ConfigError, DataError

ORDERS = ("sequential", "random", "block", "group_by_modality_length")
PadTo = Literal["step", "micro_batch"]
Order = Literal["sequential", "random", "block", "group_by_modality_length"]


@dataclass(frozen=True)
class BlockShuffle:
    """Order `block`: blocks of `size` consecutive items are permuted; `window` blocks are shuffled together."""

    size: int = 64
    window: int = 32


@dataclass(frozen=True)
class GlobalBatch:
    """Samples that one optimizer step trains on all data-parallel ranks together.

    rows: [n] row numbers of the index, in sampler order.
    lengths: [n] positions of each sample, image slots included, padding excluded.
    sequence_length: S of all micro-batches, or of the longest one.
    trained_tokens: positions that carry a label.
    counts: [G] samples of each pack; None when each sample has its own sequence.
    padded: [n] positions with padding, when micro-batches differ in S.
    """

    step: int
    rows: np.ndarray
    lengths: np.ndarray
    sequence_length: int
    images: int
    trained_tokens: int
    counts: np.ndarray | None = None
    padded: np.ndarray | None = None

    @property
    def positions(self) -> int:
        """Computed positions, padding included."""
        return self.sequence_length * self.sequences if self.padded is None else int(self.padded.sum())

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int(self.lengths.sum())

    @property
    def sequences(self) -> int:
        """Number of sequences in the step."""
        return len(self.rows) if self.counts is None else len(self.counts)


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one micro-batch, sequence after sequence.

    segments: lengths of the samples of each sequence (see Batch); None: one sample per sequence.
    """

    rows: tuple[int, ...]
    sequence_length: int
    segments: tuple[tuple[int, ...], ...] | None


class Sampler:
    """Sample order of a whole run, as a pure function of index, settings and seed."""

    def __init__(
        self,
        index: Index | BlendedIndex,
        *,
        order: Order,
        group_size: int | None,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        tokens_per_image: int,
        pad_multiple: int,
        blocks: BlockShuffle = BlockShuffle(),
        packing: Packing | None = None,
        pad_to: PadTo = "step",
    ) -> None:
        """Check the sizes and build the packs.

        group_size: samples per group of group_by_modality_length; None for the global batch size.
        tokens_per_image: positions that one image takes.
        pad_multiple: S is rounded up to a multiple of it, unless samples are packed.
        pad_to: scope (step or micro-batch) whose longest sample determines S.

        Raises ConfigError for sizes that do not divide, DataError for an empty index and for a sample longer than a
        pack.
        """
        if not len(index):
            raise DataError(f"data set {index.directory}: has no samples; nothing can be trained on it")
        if order not in ORDERS:
            raise ConfigError(f"data.order {order!r}: expected one of {', '.join(ORDERS)}")
        if packing and order == "group_by_modality_length":
            raise ConfigError(
                "data.order group_by_modality_length groups samples of similar length and has no effect with packing; "
                "use order random"
            )
        if global_batch_size % micro_batch_size:
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                f"train.micro_batch_size {micro_batch_size}"
            )
        group_size = group_size or global_batch_size
        if group_size % micro_batch_size:
            raise ConfigError(
                f"data.group_size {group_size} is not a multiple of train.micro_batch_size {micro_batch_size}"
            )
        self.order, self.seed, self.group_size, self.blocks, self.packing = order, seed, group_size, blocks, packing
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.tokens_per_image, self.pad_multiple = tokens_per_image, pad_multiple
        self._pads_per_micro_batch = pad_to == "micro_batch" and packing is None
        self.index = index
        self._rows = index.rows
        self._samples = source_rows(index)
        self._packs = self._make_packs(packing) if packing else None
        self._items = _item_ranges(self._samples, self._packs)
        self._takes = [max(1, round(share.count * share.epochs)) for share in self._items]
        self._epochs: dict[int, np.ndarray] = {}
        self._consumed_before = [np.zeros(len(self._items), dtype=np.int64)]

    @classmethod
    def from_config(cls, config: RunConfig, index: Index | BlendedIndex, *, order: Order | None = None) -> Sampler:
        """Build the sampler of a run over `index`; `order` None means data.order. Raises as the constructor does."""
        data, train = config.data, config.train
        return cls(
            index,
            order=order or data.order,
            group_size=data.group_size,
            seed=config.run.seed,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            tokens_per_image=config.model.vision.num_features,
            pad_multiple=config.length_multiple(),
            blocks=BlockShuffle(size=data.block_size, window=data.block_window),
            packing=Packing(length=data.pack_length, window=data.pack_window) if data.pack_length else None,
            pad_to=data.pad_to,
        )

    @property
    def spec(self) -> dict[str, str | int | float]:
        """Everything that determines the sequence of samples, stored in checkpoints for comparison.

        The global batch size is left out: it only sets how far one step advances along the sequence.
        """
        spec: dict[str, str | int | float] = {
            "version": 1,
            "index": self.index.fingerprint,
            "order": self.order,
            "seed": self.seed,
        }
        if self.order == "group_by_modality_length":
            spec |= {"group_size": self.group_size, "micro_batch_size": self.micro_batch_size}
        if self.order == "block":
            spec |= {"block_size": self.blocks.size, "block_window": self.blocks.window}
        if self.packing:
            spec |= {
                "pack_length": self.packing.length,
                "pack_window": self.packing.window,
                "tokens_per_image": self.tokens_per_image,
            }
        return spec

    @property
    def fingerprint(self) -> str:
        """sha256 of `spec`: equal fingerprints mean equal data."""
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()

    @property
    def epoch_items(self) -> int:
        """Items per epoch: the samples, unless samples are packed or blended."""
        return sum(self._takes)

    @property
    def fill(self) -> float:
        """Fraction of the positions of all packs that hold samples; 1 when samples are not packed."""
        if not self._packs or not self.packing:
            return 1.0
        return float(self._positions(self._rows).sum() / (len(self._packs) * self.packing.length))

    def epoch(self, number: int) -> np.ndarray:
        """Items of epoch `number` in order: [epoch_items] int64 row numbers, or pack numbers with packing."""
        if number not in self._epochs:
            if len(self._epochs) > 1:
                # A step spans two epochs at most, unless the data set is tiny.
                self._epochs.pop(min(self._epochs))
            self._epochs[number] = self._make_epoch(number)
        return self._epochs[number]

    def rows_of(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate the row numbers of `items`, and count the rows of each item."""
        return self._packs.rows_of(items) if self._packs else (items, np.ones(len(items), dtype=np.int64))

    def global_batch(self, step: int) -> GlobalBatch:
        """Samples of optimizer step `step`, counted from 0."""
        rows, counts = self.rows_of(self._slice(step * self.global_batch_size, (step + 1) * self.global_batch_size))
        entries = self._rows[rows]
        positions = self._positions(entries)
        return GlobalBatch(
            step=step,
            rows=rows,
            lengths=positions,
            sequence_length=self.packing.length if self.packing else self._padded(positions),
            images=int(entries["n_img"].sum(dtype=np.int64)),
            trained_tokens=int(entries["n_lab"].sum(dtype=np.int64)),
            counts=counts if self.packing else None,
            padded=self._padded_per_micro_batch(positions) if self._pads_per_micro_batch else None,
        )

    def _padded_per_micro_batch(self, positions: np.ndarray) -> np.ndarray:
        """[n] padded length of each sample when S is set per micro-batch."""
        longest = positions.reshape(-1, self.micro_batch_size).max(axis=1)
        return np.repeat(-(-longest // self.pad_multiple) * self.pad_multiple, self.micro_batch_size)

    def _padded(self, positions: np.ndarray) -> int:
        """Longest of `positions`, rounded up to pad_multiple."""
        return -(-int(positions.max()) // self.pad_multiple) * self.pad_multiple

    def micro_batches_per_rank(self, *, data_size: int) -> int:
        """Micro-batches that each of `data_size` data-parallel ranks runs per step.

        Raises ConfigError when the micro-batches of a step do not divide by `data_size`.
        """
        count = self.global_batch_size // self.micro_batch_size
        if count % data_size:
            unit = self.micro_batch_size * data_size
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} is {count} micro-batches of "
                f"{self.micro_batch_size}, which do not divide by {data_size} "
                f"data-parallel ranks; use a multiple of {unit}"
            )
        return count // data_size

    def micro_batches(self, batch: GlobalBatch, *, data_rank: int, data_size: int) -> list[MicroBatch]:
        """Micro-batches of data-parallel rank `data_rank`, in order.

        The global batch is cut into M micro-batches whatever `data_size` is; rank r runs r, r + data_size, ... of them.
        """
        self.micro_batches_per_rank(data_size=data_size)
        ends = (
            np.arange(len(batch.rows) + 1) if batch.counts is None else np.concatenate([[0], np.cumsum(batch.counts)])
        )
        result = []
        for first in range(
            data_rank * self.micro_batch_size, self.global_batch_size, data_size * self.micro_batch_size
        ):
            bounds = ends[first : first + self.micro_batch_size + 1].tolist()
            segments = tuple(tuple(batch.lengths[start:end].tolist()) for start, end in itertools.pairwise(bounds))
            rows = tuple(batch.rows[bounds[0] : bounds[-1]].tolist())
            length = (
                self._padded(batch.lengths[bounds[0] : bounds[-1]])
                if self._pads_per_micro_batch
                else batch.sequence_length
            )
            result.append(MicroBatch(rows=rows, sequence_length=length, segments=segments if self.packing else None))
        return result

    def consumed(self, steps: int) -> dict[str, int]:
        """Count the samples of the first `steps` steps, by source."""
        epoch, offset = divmod(steps * self.global_batch_size, self.epoch_items)
        while len(self._consumed_before) <= epoch:
            number = len(self._consumed_before) - 1
            self._consumed_before.append(self._consumed_before[-1] + self._count(self._visited(number)))
        counts = self._consumed_before[epoch] + (self._count(self.epoch(epoch)[:offset]) if offset else 0)
        return {share.name: int(count) for share, count in zip(self._items, counts)}

    def _count(self, items: np.ndarray) -> np.ndarray:
        """Count the samples in `items`, by source."""
        source = np.searchsorted([share.start for share in self._items], items, side="right") - 1
        weights = np.diff(self._packs.bounds)[items] if self._packs else None
        return np.bincount(source, weights=weights, minlength=len(self._items)).astype(np.int64)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop) of the endless sequence of epochs."""
        size = self.epoch_items
        slices = []
        while start < stop:
            epoch, offset = divmod(start, size)
            slices.append(self.epoch(epoch)[offset : offset + stop - start])
            start += len(slices[-1])
        return np.concatenate(slices)

    def _visited(self, epoch: int) -> np.ndarray:
        """Items of an epoch, source after source."""
        chosen = [
            share.start + select_items(share.count, take=take, seed=self.seed, epoch=epoch, source=number)
            for number, (share, take) in enumerate(zip(self._items, self._takes))
        ]
        return np.concatenate(chosen)

    def _make_epoch(self, epoch: int) -> np.ndarray:
        """Apply the configured order to the items of an epoch."""
        visited = self._visited(epoch)
        if self.order == "sequential":
            return visited
        if self.order == "random":
            return visited[random_order(len(visited), seed=self.seed, epoch=epoch)]
        if self.order == "block":
            size, window = self.blocks.size, self.blocks.window
            return visited[block_order(len(visited), block_size=size, window=window, seed=self.seed, epoch=epoch)]
        words = self._rows["words"][visited]
        group_size, batch_size = self.group_size, self.micro_batch_size
        offset = epoch * self.epoch_items
        return visited[
            modality_length_order(
                words, group_size=group_size, batch_size=batch_size, seed=self.seed, epoch=epoch, offset=offset
            )
        ]

    def _positions(self, entries: np.ndarray) -> np.ndarray:
        """Positions of each index entry, image slots included."""
        return entries["n_tok"].astype(np.int64) + entries["n_img"].astype(np.int64) * (self.tokens_per_image - 1)

    def _make_packs(self, packing: Packing) -> Packs:
        """Pack each source by itself; packs are the same in every epoch, only their order changes.

        Every epoch has therefore the same number of items, and any step is found in constant time. For the orders
        `block` and `sequential` packs are formed from neighbouring rows, which keeps reads contiguous.
        """
        lengths = self._positions(self._rows)
        longest = int(lengths.argmax())
        if lengths[longest] > packing.length:
            raise DataError(
                f"sample {self.index.key(longest)} takes {lengths[longest]} positions, more than "
                f"data.pack_length {packing.length}; raise data.pack_length, or "
                "prepare the data set with a smaller max_text_length"
            )
        parts = []
        for share in self._samples:
            rows = (
                random_order(share.count, seed=self.seed, epoch=0) if self.order == "random" else np.arange(share.count)
            )
            parts.append(pack_samples(rows, lengths[share.start + rows], packing))
        return concatenate_packs(parts, offsets=[share.start for share in self._samples])


def _item_ranges(samples: tuple[SourceRows, ...], packs: Packs | None) -> tuple[SourceRows, ...]:
    """Row ranges of the sources converted to item ranges."""
    if packs is None:
        return samples
    starts = np.searchsorted(packs.bounds, [share.start for share in samples]).tolist()
    ends = [*starts[1:], len(packs)]
    return tuple(
        SourceRows(name=share.name, start=start, count=end - start, epochs=share.epochs)
        for share, start, end in zip(samples, starts, ends)
    )
