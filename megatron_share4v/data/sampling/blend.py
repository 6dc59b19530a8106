"""Blend of several prepared data sets behind the interface of one index, with consecutive row numbers.

Sets how much of each data set an epoch holds; sampler.py orders the mixture.
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
from megatron_share4v.text.template_format import Template
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import TokenizerRule


@dataclass(frozen=True)
class BlendMember:
    """One data set of a blend; an epoch of the blend visits it `epochs` times (a fraction is allowed)."""

    name: str
    index: Index
    epochs: float


@dataclass(frozen=True)
class SourceRows:
    """Row range start .. start + count - 1 of source `name`, visited `epochs` times per epoch."""

    name: str
    start: int
    count: int
    epochs: float


class BlendedIndex:
    """Several indexes with the interface of one Index. Pickles as its members."""

    def __init__(self, members: Sequence[BlendMember]) -> None:
        self.members = tuple(members)
        self._starts = np.cumsum([0, *(len(member.index) for member in self.members)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return BlendedIndex, (self.members,)

    @property
    def directory(self) -> str:
        """All directories, for messages."""
        return " + ".join(str(member.index.directory) for member in self.members)

    @cached_property
    def rows(self) -> np.ndarray:
        """[N] of index.ROW, copied into memory: needed by the sampler, not by sample readers."""
        return np.concatenate([member.index.rows for member in self.members])

    @property
    def fingerprint(self) -> str:
        """sha256 over all data sets and their epochs."""
        identity = [(member.index.fingerprint, member.epochs) for member in self.members]
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    @property
    def tokenizer_rule(self) -> TokenizerRule | None:
        """Rule of the first data set; `check` refuses the others if theirs differ."""
        return self.members[0].index.tokenizer_rule

    @property
    def sources(self) -> tuple[SourceRows, ...]:
        """Row range of each source."""
        starts = zip(self.members, self._starts.tolist())
        return tuple(
            SourceRows(name=member.name, start=start, count=len(member.index), epochs=member.epochs)
            for member, start in starts
        )

    def locate(self, row: int) -> tuple[int, int]:
        """Return (member number, row inside the member)."""
        member = int(np.searchsorted(self._starts, row, side="right")) - 1
        return member, row - int(self._starts[member])

    def key(self, row: int) -> str:
        """`source:key`, unique in the blend."""
        number, local = self.locate(row)
        member = self.members[number]
        return f"{member.name}:{member.index.key(local)}"

    def check(self, *, tokenizer: Tokenizer, template: Template, max_text_length: int) -> None:
        """Run Index.check on each member."""
        for member in self.members:
            member.index.check(tokenizer=tokenizer, template=template, max_text_length=max_text_length)


class BlendedSampleReader:
    """Reader of blended samples by row, with one SampleReader per member."""

    def __init__(self, blend: BlendedIndex) -> None:
        self.index = blend
        self._readers = [SampleReader(member.index) for member in blend.members]

    def read(self, row: int, *, with_image: bool) -> Sample:
        """Read sample `row` (see SampleReader.read)."""
        member, local = self.index.locate(row)
        return self._readers[member].read(local, with_image=with_image)

    def close(self) -> None:
        """Close all shards; the next read opens them again."""
        for reader in self._readers:
            reader.close()


def open_index(train: str | Sequence[BlendSource]) -> Index | BlendedIndex:
    """Open the data set, or the blend of data sets, that `data.train` names.

    Weights become epochs: one epoch of the blend has as many samples as all its data sets together. Raises DataError as
    Index.open does.
    """
    if isinstance(train, str):
        return Index.open(train)
    indexes = [Index.open(source.path) for source in train]
    weights = sum(source.weight or 0.0 for source in train)
    total = sum(len(index) for index in indexes)
    folders = [Path(source.path).name for source in train]
    repeated = {name for name, times in Counter(folders).items() if times > 1}
    members = []
    for source, index, folder in zip(train, indexes, folders):
        epochs = total * source.weight / weights / max(len(index), 1) if source.weight else source.epochs or 1.0
        members.append(BlendMember(name=source.path if folder in repeated else folder, index=index, epochs=epochs))
    return BlendedIndex(members)


def open_sample_reader(index: Index | BlendedIndex) -> SampleReader | BlendedSampleReader:
    """Open a reader of samples by the row numbers of `index`."""
    return BlendedSampleReader(index) if isinstance(index, BlendedIndex) else SampleReader(index)


def source_rows(index: Index | BlendedIndex) -> tuple[SourceRows, ...]:
    """Row ranges of the sources of `index`; a single data set is one source."""
    return (
        index.sources
        if isinstance(index, BlendedIndex)
        else (SourceRows(name=Path(index.directory).name, start=0, count=len(index), epochs=1.0),)
    )
