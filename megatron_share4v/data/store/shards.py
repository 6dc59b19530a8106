"""WebDataset shards (`shard-000000.tar` with `key.jpg|png|webp|...` and `key.json`): written in order, read by member.

Reading never parses a tar file: the index holds offset, length and crc32 of every member.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_share4v.errors import DataError

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

REMEDY = "copy the data set again from where it was prepared, or run tools/prepare_data.py again"


@dataclass(frozen=True)
class Member:
    """Byte range and crc32 of one file inside a shard; `length` 0: the sample has no such file."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class SampleLocation:
    """Shard number (from 0) and members of one sample."""

    shard: int
    image: Member
    text: Member


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Writer of samples in order, `samples_per_shard` per file. The same samples give the same bytes."""

    def __init__(self, directory: Path, *, samples_per_shard: int, first: int = 0) -> None:
        """first: number of existing shards, which are kept."""
        # Imported here: loading webdataset takes a second, and training only reads.
        from webdataset import writer

        self._new_tar = writer.TarWriter
        self._directory = directory
        self._samples_per_shard = samples_per_shard
        self._tar: TarWriter | None = None
        self._in_shard = 0
        self.names = [shard_name(number) for number in range(first)]

    @property
    def is_full(self) -> bool:
        """Whether the open shard has all its samples; the next one goes into a new shard."""
        return self._in_shard == self._samples_per_shard

    @property
    def is_closed(self) -> bool:
        """Whether no shard is open: nothing was written since the last `close`."""
        return self._tar is None

    def write(self, key: str, *, text: bytes, image: bytes, extension: str) -> SampleLocation:
        """Append one sample: `text` as key.json and, unless empty, `image` as key.<extension>.

        `key` must have no dot and at most 90 characters.
        """
        if self.is_full:
            self.close()
        if self._tar is None:
            self.names.append(shard_name(len(self.names)))
            self._tar = self._new_tar(str(self._directory / self.names[-1]), encoder=False, mtime=0)
        tar = self._tar
        self._in_shard += 1
        image_member = _add(tar, key, extension, image) if image else Member(offset=0, length=0, crc32=0)
        return SampleLocation(shard=len(self.names) - 1, image=image_member, text=_add(tar, key, "json", text))

    def close(self) -> None:
        """Finish the open shard; must be called after the last sample."""
        if self._tar is not None:
            self._tar.close()
        self._tar, self._in_shard = None, 0


def _add(tar: TarWriter, key: str, extension: str, data: bytes) -> Member:
    """Append one file to a tar archive."""
    tar.write({"__key__": key, extension: data})
    # Computed from the end of the member, which is padded to whole blocks: headers vary in size.
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return Member(offset=tar.tarstream.offset - blocks * tarfile.BLOCKSIZE, length=len(data), crc32=zlib.crc32(data))


class ShardReader:
    """Reader of members by position. Files are opened on first use and never shared across processes."""

    def __init__(self, directory: Path, names: tuple[str, ...]) -> None:
        self.directory = directory
        self.names = names
        self._files: dict[int, int] = {}

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, tuple[str, ...]]]:
        return ShardReader, (self.directory, self.names)

    def read(self, shard: int, member: Member, *, key: str) -> bytes:
        """Read and verify a member. Raises DataError naming shard and key when it is missing, cut or changed."""
        name = self.names[shard]
        data = os.pread(self._open(shard), member.length, member.offset)
        if len(data) < member.length:
            end = member.offset + member.length
            size = os.fstat(self._files[shard]).st_size
            raise DataError(
                f"{name}:{key}: the shard ends at byte {size}, the sample lies at {member.offset}..{end} "
                f"({self.directory / name}); {REMEDY}"
            )
        if zlib.crc32(data) != member.crc32:
            raise DataError(
                f"{name}:{key}: crc32 is {zlib.crc32(data):08x}, expected {member.crc32:08x}: "
                f"the shard has changed since it was prepared ({self.directory / name}); {REMEDY}"
            )
        return data

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            path = self.directory / self.names[shard]
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"shard {path}: cannot be opened ({error.strerror}); {REMEDY}") from error
            if hasattr(os, "posix_fadvise"):
                # Samples are read in random order, so readahead would fetch unneeded bytes.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._files[shard] = descriptor
        return self._files[shard]
