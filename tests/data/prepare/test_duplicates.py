"""Duplicates: groups from hashes are equal to those from a comparison of all pairs."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np

from megatron_share4v.data.prepare.duplicates import find_duplicates
from megatron_share4v.data.prepare.growing_array import GrowingArray


def test_groups_are_what_pairs_say():
    rng = np.random.default_rng(0)
    count = 60
    n_img = (rng.random(count) < 0.7).astype(np.uint8)
    path = np.where(n_img, rng.integers(1, 30, count), 0).astype(np.uint64)
    length = np.where(n_img, path % 5, 0).astype(np.uint32)  # equal paths have equal bytes
    crc32 = np.where(n_img, path % 3, 0).astype(np.uint32)
    identity = rng.integers(0, 12, count).astype(np.uint64)
    found = find_duplicates(identity=identity, path=path, n_img=n_img, length=length, crc32=crc32)
    first = {value: row for row, value in reversed(list(enumerate(path.tolist()))) if n_img[row]}
    same_record = {(a, b) for a, b in combinations(range(count), 2) if (identity[a], path[a]) == (identity[b], path[b])}
    same_image = {
        (a, b) for a, b in combinations(sorted(first.values()), 2) if (length[a], crc32[a]) == (length[b], crc32[b])
    }
    assert {pair for group in found.records for pair in combinations(group, 2)} == same_record
    assert {pair for group in found.images for pair in combinations(group, 2)} == same_image
    assert found.shared == int(n_img.sum()) - len(first) > 0


def test_nothing_is_no_duplicate(tmp_path: Path):
    none = np.empty(0, dtype=np.uint64)
    found = find_duplicates(identity=none, path=none, n_img=none, length=none, crc32=none)
    assert (found.records, found.images, found.shared, str(found)) == ((), (), 0, "")
    texts = np.zeros(3, dtype=np.uint64)
    equal = find_duplicates(identity=texts, path=texts, n_img=texts, length=texts, crc32=texts)
    equal.write(tmp_path / "d.jsonl", keys=["a", "b", "c"])
    assert [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()] == [
        {"kind": "record", "keys": ["a", "b", "c"]}
    ]


def test_table_grows():
    table = GrowingArray(np.dtype([("x", "<u4")]))
    for number in range(3000):
        table.append((number,))
    assert len(table) == 3000 and np.array_equal(table.rows["x"], np.arange(3000))
    more = GrowingArray(table.rows.dtype, table.rows.copy())
    more.append((7,))
    assert more.rows["x"][-1] == 7 and len(more) == 3001 and len(table) == 3000
