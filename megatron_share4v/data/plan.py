"""Which samples each optimizer step trains, how they are cut into micro-batches, and how long their sequences are: pure arithmetic.

Epochs follow each other without a gap: step k takes items [k G, (k + 1) G) of the endless sequence. Every rank computes the plan alike,
so all pipeline stages know all shapes and nothing is communicated. G global batch, M micro-batches of a step, S sequence length.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from megatron_share4v.data.index import Index
from megatron_share4v.data.orders import modality_length_order, random_order
from megatron_share4v.errors import ConfigError, DataError

ORDERS = ("sequential", "random", "group_by_modality_length")


@dataclass(frozen=True)
class StepItems:
    """What one optimizer step trains, all data-parallel ranks together.

    rows: [G] row numbers of the index, in plan order. lengths: [G] positions of each sample, image slots included, padding not.
    sequence_length: S of all its micro-batches. trained_tokens: positions that carry a label.
    """

    step: int
    rows: np.ndarray
    lengths: np.ndarray
    sequence_length: int
    images: int
    trained_tokens: int

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int(self.lengths.sum())


class Plan:
    """The sequence of samples of a whole run."""

    def __init__(
        self,
        index: Index,
        *,
        order: str,
        group_size: int | None,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        tokens_per_image: int,
        pad_multiple: int,
    ) -> None:
        """group_size: samples per group of group_by_modality_length, None for the global batch size; tokens_per_image: positions that one
        image takes; pad_multiple: S is rounded up to it. Raises ConfigError for sizes that do not divide, DataError for an empty index.
        """
        if not len(index):
            raise DataError(f"data set {index.directory}: has no samples; nothing can be trained on it")
        if order not in ORDERS:
            raise ConfigError(f"data.order {order!r}: expected one of {', '.join(ORDERS)}")
        if global_batch_size % micro_batch_size:
            raise ConfigError(f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size {micro_batch_size}")
        group_size = group_size or global_batch_size
        if group_size % micro_batch_size:
            raise ConfigError(f"data.group_size {group_size} is not a multiple of train.micro_batch_size {micro_batch_size}")
        self.order, self.seed, self.group_size = order, seed, group_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.tokens_per_image, self.pad_multiple = tokens_per_image, pad_multiple
        self._index = index
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the sequence of samples. With the count of consumed samples it is the state of the data.

        The global batch size is left out: it only says how far one step goes along the sequence.
        """
        identity = {"version": 1, "index": self._index.fingerprint, "order": self.order, "seed": self.seed}
        if self.order == "group_by_modality_length":
            identity |= {"group_size": self.group_size, "micro_batch_size": self.micro_batch_size}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def epoch(self, number: int) -> np.ndarray:
        """[N] int64: the order of epoch `number`."""
        if number not in self._epochs:
            if len(self._epochs) > 1:
                # A step reaches into two epochs at most, unless the data set is tiny.
                self._epochs.pop(min(self._epochs))
            self._epochs[number] = self._make_epoch(number)
        return self._epochs[number]

    def step(self, step: int) -> StepItems:
        """The samples of optimizer step `step`, counted from 0."""
        rows = self._items(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        entries = self._index.rows[rows]
        images = entries["n_img"].astype(np.int64)
        positions = entries["n_tok"].astype(np.int64) + images * (self.tokens_per_image - 1)
        return StepItems(
            step=step,
            rows=rows,
            lengths=positions,
            sequence_length=-(-int(positions.max()) // self.pad_multiple) * self.pad_multiple,
            images=int(images.sum()),
            trained_tokens=int(entries["n_lab"].sum(dtype=np.int64)),
        )

    def micro_batches_per_rank(self, *, data_size: int) -> int:
        """How many micro-batches each of `data_size` data-parallel ranks runs per step. Raises ConfigError when M does not divide."""
        count = self.global_batch_size // self.micro_batch_size
        if count % data_size:
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} is {count} micro-batches of {self.micro_batch_size}, which {data_size} "
                f"data-parallel ranks cannot share evenly; use a multiple of {self.micro_batch_size * data_size}"
            )
        return count // data_size

    def micro_batches(self, items: StepItems, *, data_rank: int, data_size: int) -> list[np.ndarray]:
        """The rows of each micro-batch that data-parallel rank `data_rank` runs, in order.

        The global batch is cut into M micro-batches whatever `data_size` is; rank r runs r, r + data_size, ... of them.
        """
        self.micro_batches_per_rank(data_size=data_size)
        return list(items.rows.reshape(-1, self.micro_batch_size)[data_rank::data_size])

    def _items(self, start: int, stop: int) -> np.ndarray:
        size = len(self._index)
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, size)
            pieces.append(self.epoch(epoch)[offset : offset + stop - start])
            start += len(pieces[-1])
        return np.concatenate(pieces)

    def _make_epoch(self, epoch: int) -> np.ndarray:
        if self.order == "sequential":
            return np.arange(len(self._index), dtype=np.int64)
        if self.order == "random":
            return random_order(len(self._index), seed=self.seed, epoch=epoch)
        return modality_length_order(
            np.asarray(self._index.rows["words"]),
            group_size=self.group_size,
            batch_size=self.micro_batch_size,
            seed=self.seed,
            epoch=epoch,
        )
