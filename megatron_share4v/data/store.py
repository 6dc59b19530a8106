"""Reads one sample of a prepared data set: its row in the index leads to the bytes in a shard. Decodes nothing."""

from __future__ import annotations

import json

from megatron_share4v.data.index import Index
from megatron_share4v.data.sample import Sample
from megatron_share4v.data.shards import Member, ShardReader
from megatron_share4v.data.sources import parse_record


class SampleStore:
    """The samples of an index, by row number. Can be sent to another process."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._shards = ShardReader(index.directory, tuple(shard.name for shard in index.info.shards))

    def read(self, row: int, *, with_image: bool) -> Sample:
        """Sample `row`; without `with_image` the image's bytes are left on disk.

        Raises DataError naming shard and key when the shard is missing, cut or changed.
        """
        entry = self.index.rows[row]
        shard, key = int(entry["shard"]), self.index.key(row)
        name = f"{self._shards.names[shard]}:{key}"
        record = parse_record(json.loads(self._shards.read(shard, _member(entry, "text"), key=key)), where=name)
        has_image = bool(entry["n_img"])
        image = self._shards.read(shard, _member(entry, "image"), key=key) if has_image and with_image else None
        return Sample(key=key, turns=record.turns, image=image, has_image=has_image, shard=self._shards.names[shard])

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        self._shards.close()


def _member(entry: object, kind: str) -> Member:
    return Member(offset=int(entry[f"{kind}_offset"]), length=int(entry[f"{kind}_length"]), crc32=int(entry[f"{kind}_crc32"]))
