"""Several prepared data sets as one: rows are numbered over all of them, one after the other. What share each has is said here; the order of
the mixture is made by sampler.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_share4v.config.data import BlendSource
from megatron_share4v.data.records import Sample
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BlendMember:
    """One data set of a blend. epochs: how often an epoch of the blend goes through it; need not be whole."""

    name: str
    index: Index
    epochs: float


@dataclass(frozen=True)
class SourceRows:
    """Rows start .. start + count - 1 belong to source `name`, visited `epochs` times per epoch."""

    name: str
    start: int
    count: int
    epochs: float


class BlendedIndex:
    """What an Index is to its users, over several of them. Pickles as its parts."""

    def __init__(self, parts: Sequence[BlendMember]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part.index) for part in self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return BlendedIndex, (self.parts,)

    @property
    def directory(self) -> str:
        """All directories, for messages."""
        return " + ".join(str(part.index.directory) for part in self.parts)

    @cached_property
    def rows(self) -> np.ndarray:
        """[N] of index.ROW. A copy in memory, unlike an Index's: only what plans needs it, not what reads samples."""
        return np.concatenate([part.index.rows for part in self.parts])

    @property
    def fingerprint(self) -> str:
        """sha256 over all data sets and their shares."""
        identity = [(part.index.fingerprint, part.epochs) for part in self.parts]
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    @property
    def shares(self) -> tuple[SourceRows, ...]:
        """The rows of each source."""
        counts = zip(self.parts, self._starts.tolist())
        return tuple(
            SourceRows(name=part.name, start=start, count=len(part.index), epochs=part.epochs) for part, start in counts
        )

    def locate(self, row: int) -> tuple[int, int]:
        """(number of the part, row inside it)."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - int(self._starts[part])

    def key(self, row: int) -> str:
        """`source:key`, unique in the blend."""
        part, local = self.locate(row)
        return f"{self.parts[part].name}:{self.parts[part].index.key(local)}"

    def check(self, *, tokenizer: Tokenizer, template: str, max_text_length: int) -> None:
        """As Index.check, for each part."""
        for part in self.parts:
            part.index.check(tokenizer=tokenizer, template=template, max_text_length=max_text_length)


class BlendedSampleReader:
    """Reads samples of a blend by their row; one SampleReader per part."""

    def __init__(self, blend: BlendedIndex) -> None:
        self.index = blend
        self._stores = [SampleReader(part.index) for part in blend.parts]

    def read(self, row: int, *, with_image: bool) -> Sample:
        """As SampleReader.read."""
        part, local = self.index.locate(row)
        return self._stores[part].read(local, with_image=with_image)

    def close(self) -> None:
        """Close all shards; reading opens them again."""
        for store in self._stores:
            store.close()


def open_index(train: str | Sequence[BlendSource]) -> Index | BlendedIndex:
    """What `data.train` names. A weight becomes a number of epochs: an epoch of the blend is as long as all its data sets together.

    Raises DataError as Index.open does.
    """
    if isinstance(train, str):
        return Index.open(train)
    indexes = [Index.open(source.path) for source in train]
    weights = sum(source.weight or 0.0 for source in train)
    total = sum(len(index) for index in indexes)
    folders = [Path(source.path).name for source in train]
    repeated = {name for name, times in Counter(folders).items() if times > 1}
    parts = []
    for source, index, folder in zip(train, indexes, folders):
        epochs = total * source.weight / weights / max(len(index), 1) if source.weight else source.epochs or 1.0
        parts.append(BlendMember(name=source.path if folder in repeated else folder, index=index, epochs=epochs))
    return BlendedIndex(parts)


def open_sample_reader(index: Index | BlendedIndex) -> SampleReader | BlendedSampleReader:
    """Reads samples by the rows of `index`."""
    return BlendedSampleReader(index) if isinstance(index, BlendedIndex) else SampleReader(index)


def source_rows(index: Index | BlendedIndex) -> tuple[SourceRows, ...]:
    """The sources of `index`; a single data set is one."""
    return (
        index.shares
        if isinstance(index, BlendedIndex)
        else (SourceRows(name=Path(index.directory).name, start=0, count=len(index), epochs=1.0),)
    )
