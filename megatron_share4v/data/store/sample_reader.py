"""Reader of single samples of a prepared data set, located in shards by their index row. No decoding."""

from __future__ import annotations

import json
import time

import numpy as np

from megatron_share4v.data.prepare.annotations import Record, parse_record
from megatron_share4v.data.prepare.image_files import read_in_place
from megatron_share4v.data.records import Sample
from megatron_share4v.data.store.index import IN_PLACE, Index
from megatron_share4v.data.store.shards import Member, ShardReader
from megatron_share4v.errors import DataError
from megatron_share4v.logging import get_logger

PAUSES_S = (0.1, 0.5, 2.0)


class SampleReader:
    """Samples of an index by row number. Can be pickled to another process."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._shards = ShardReader(index.directory, tuple(shard.name for shard in index.info.shards))

    def read(self, row: int, *, with_image: bool) -> Sample:
        """Read sample `row`; without `with_image` the image bytes are not read.

        Retries transient I/O errors three times; CRC mismatches are permanent. Raises DataError naming shard and key
        when the shard is missing, cut or changed, or when the retries fail.
        """
        for pause in PAUSES_S:
            try:
                return self._read(row, with_image=with_image)
            except (OSError, DataError) as error:
                # Retry transient I/O errors; CRC mismatches are permanent.
                if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
                    raise
                get_logger().warning("row %d: %s; retrying in %g s", row, error, pause)
            self.close()
            time.sleep(pause)
        try:
            return self._read(row, with_image=with_image)
        except OSError as error:
            name = f"{self._shards.names[int(self.index.rows[row]['shard'])]}:{self.index.key(row)}"
            raise DataError(
                f"{name}: cannot be read after {len(PAUSES_S)} retries ({error}); check the storage"
            ) from error

    def _read(self, row: int, *, with_image: bool) -> Sample:
        entry = self.index.rows[row]
        shard, key = int(entry["shard"]), self.index.key(row)
        name = f"{self._shards.names[shard]}:{key}"
        record = parse_record(json.loads(self._shards.read(shard, _member(entry, "text"), key=key)), where=name)
        has_image = bool(entry["n_img"])
        image = self._image(entry, record, key=key) if has_image and with_image else None
        return Sample(key=key, turns=record.turns, image=image, has_image=has_image, shard=self._shards.names[shard])

    def _image(self, entry: np.void, record: Record, *, key: str) -> bytes:
        shard, member = int(entry["image_shard"]), _member(entry, "image")
        if shard == IN_PLACE:
            return read_in_place(self.index.info.images_root, record.image, member, key=key)
        return self._shards.read(shard, member, key=key)

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        self._shards.close()


def _member(entry: np.void, kind: str) -> Member:
    return Member(
        offset=int(entry[f"{kind}_offset"]), length=int(entry[f"{kind}_length"]), crc32=int(entry[f"{kind}_crc32"])
    )
