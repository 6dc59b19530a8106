"""KV cache rows are never allocated twice, found by prefix, and evicted in LRU order."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_share4v.data.loading.prompt import Prompt
from megatron_share4v.infer.kv_allocator import KVAllocator, KVRange
from megatron_share4v.infer.prefix_hash import BLOCK_SIZE, block_keys, image_digest, prompt_content, text_content


def keys_of(ids: list[int]) -> list[bytes]:
    return block_keys(text_content(ids))


def allocate_and_free(kv_allocator: KVAllocator, ids: list[int]) -> KVRange:
    """Run a sequence to its end; its full blocks stay in the prefix cache."""
    allocation = kv_allocator.allocate(len(ids), keys_of(ids)[: (len(ids) - 1) // BLOCK_SIZE])
    kv_allocator.cache_blocks(allocation.kv_range, keys_of(ids))
    kv_allocator.free(allocation.kv_range)
    return allocation.kv_range


def test_prefix_hit_is_copied_to_new_rows() -> None:
    kv_allocator = KVAllocator(200)
    first = list(range(50))
    allocate_and_free(kv_allocator, first)
    assert kv_allocator.used == 0 and kv_allocator.filled == 48
    allocation = kv_allocator.allocate(60, keys_of([*first[:40], *range(100, 120)]))
    assert allocation.reused == 32 and allocation.source == 0 and allocation.kv_range.start >= 48
    assert kv_allocator.allocate(60, keys_of([7, *first])).reused == 0


def test_lru_eviction_only_if_it_makes_enough_rows_free() -> None:
    kv_allocator = KVAllocator(96)
    first, second = list(range(32)), list(range(100, 132))
    allocate_and_free(kv_allocator, first)
    allocate_and_free(kv_allocator, second)
    # Used again: the second is now least recently used.
    kv_allocator.free(kv_allocator.allocate(40, keys_of(first)).kv_range)
    assert (
        kv_allocator.find_longest_prefix(keys_of(first)) == 2 and kv_allocator.find_longest_prefix(keys_of(second)) == 0
    )
    running = kv_allocator.allocate(64, [])
    assert (running.kv_range.start, kv_allocator.find_longest_prefix(keys_of(first)), kv_allocator.used) == (32, 2, 64)
    assert kv_allocator.allocate(33, []) is None and kv_allocator.find_longest_prefix(keys_of(first)) == 2
    assert kv_allocator.allocate(32, []).kv_range.start == 0 and kv_allocator.find_longest_prefix(keys_of(first)) == 0


def test_copy_source_is_evicted_last() -> None:
    ids = list(range(32))
    kv_allocator = KVAllocator(64)
    allocate_and_free(kv_allocator, ids)
    found = kv_allocator.allocate(32, keys_of(ids))
    assert (found.kv_range.start, found.source, found.reused) == (32, 0, 32)
    kv_allocator = KVAllocator(64)
    allocate_and_free(kv_allocator, ids)
    found = kv_allocator.allocate(48, keys_of(ids))
    assert (found.kv_range.start, found.reused) == (0, 0)


def test_range_superseded_by_a_longer_one_is_freed() -> None:
    kv_allocator = KVAllocator(200)
    allocate_and_free(kv_allocator, list(range(32)))
    longer = allocate_and_free(kv_allocator, list(range(48)))
    assert kv_allocator.filled == longer.size == 48


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_never_allocated_twice(seed: int) -> None:
    draw = random.Random(seed)
    kv_allocator, running = KVAllocator(400), []
    for _ in range(600):
        if running and draw.random() < 0.5:
            kv_range, keys = running.pop(draw.randrange(len(running)))
            kv_allocator.cache_blocks(kv_range, keys[len(kv_range.keys) : draw.randint(len(kv_range.keys), len(keys))])
            kv_allocator.free(kv_range)
        else:
            ids = [draw.randrange(2) for _ in range(draw.randint(1, 90))]
            keys = keys_of(ids)
            allocation = kv_allocator.allocate(len(ids), keys[: (len(ids) - 1) // BLOCK_SIZE])
            if allocation is not None:
                kv_range, reused = allocation.kv_range, allocation.reused
                assert (
                    reused == 0
                    or allocation.source + reused <= kv_range.start
                    or kv_range.start + kv_range.size <= allocation.source
                )
                kv_allocator.cache_blocks(kv_range, keys[: reused // BLOCK_SIZE])
                running.append((kv_range, keys))
        taken = sorted(
            (kv_range.start, kv_range.size)
            for kv_range in [*(kv_range for kv_range, _ in running), *kv_allocator._evictable]
        )
        assert all(start + size <= other for (start, size), (other, _) in itertools.pairwise(taken))
        assert sum(size for _, size in taken) == kv_allocator.filled and kv_allocator.used == sum(
            kv_range.size for kv_range, _ in running
        )
    for kv_range, _ in running:
        kv_allocator.free(kv_range)
    assert kv_allocator.allocate(400, []) is not None


def test_block_keys_cover_images_ids_and_positions_and_extend() -> None:
    ids, slots = torch.arange(1, 40), torch.arange(3, 11)
    one, other = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.ones(1, 8, 8, 3, dtype=torch.uint8)

    def keys(pixels: torch.Tensor, slots: torch.Tensor = slots) -> list[bytes]:
        prompt = Prompt(token_ids=ids.index_fill(0, slots, 0), image_slots=slots, pixels=pixels)
        return block_keys(prompt_content(prompt, [image_digest(image) for image in pixels]))

    assert len(keys(one)) == 2 and keys(one) == keys(one.clone())
    assert not set(keys(one)) & set(keys(other)) and not set(keys(one)) & set(keys(one, slots + 1))
    content = text_content(list(range(50)))
    whole = block_keys(content)
    assert whole[:1] + block_keys(content, before=whole[:1]) == whole and block_keys(content, before=whole) == []
