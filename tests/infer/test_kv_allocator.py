"""The rows of the cache: never given twice, found again by their prefix, dropped in the order of their last use."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_share4v.data.loading.prompt import Prompt
from megatron_share4v.infer.kv_allocator import Place, Room
from megatron_share4v.infer.prefix_hash import BLOCK, block_keys, image_digest, prompt_content, text_content


def keys_of(ids: list[int]) -> list[bytes]:
    return block_keys(text_content(ids))


def finished(room: Room, ids: list[int]) -> Place:
    reservation = room.reserve(len(ids), keys_of(ids)[: (len(ids) - 1) // BLOCK])
    room.show(reservation.place, keys_of(ids))
    room.release(reservation.place)
    return reservation.place


def test_a_prefix_is_found_and_copied_to_rows_of_its_own() -> None:
    room = Room(200)
    first = list(range(50))
    finished(room, first)
    assert room.used == 0 and room.filled == 48
    reservation = room.reserve(60, keys_of([*first[:40], *range(100, 120)]))
    assert reservation.reused == 32 and reservation.source == 0 and reservation.place.start >= 48
    assert room.reserve(60, keys_of([7, *first])).reused == 0


def test_what_is_kept_makes_room_oldest_first_and_only_if_that_helps() -> None:
    room = Room(96)
    first, second = list(range(32)), list(range(100, 132))
    finished(room, first)
    finished(room, second)
    room.release(room.reserve(40, keys_of(first)).place)  # used again: now the second is the oldest
    assert room.longest(keys_of(first)) == 2 and room.longest(keys_of(second)) == 0
    running = room.reserve(64, [])
    assert (running.place.start, room.longest(keys_of(first)), room.used) == (32, 2, 64)
    assert room.reserve(33, []) is None and room.longest(keys_of(first)) == 2
    assert room.reserve(32, []).place.start == 0 and room.longest(keys_of(first)) == 0


def test_the_source_of_a_copy_is_not_dropped_for_it_unless_nothing_else_is_left() -> None:
    ids = list(range(32))
    room = Room(64)
    finished(room, ids)
    found = room.reserve(32, keys_of(ids))
    assert (found.place.start, found.source, found.reused) == (32, 0, 32)
    room = Room(64)
    finished(room, ids)
    found = room.reserve(48, keys_of(ids))
    assert (found.place.start, found.reused) == (0, 0)


def test_a_place_that_nobody_would_be_sent_to_is_free() -> None:
    room = Room(200)
    finished(room, list(range(32)))
    longer = finished(room, list(range(48)))
    assert room.filled == longer.size == 48


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_ever_given_twice(seed: int) -> None:
    draw = random.Random(seed)
    room, running = Room(400), []
    for _ in range(600):
        if running and draw.random() < 0.5:
            place, keys = running.pop(draw.randrange(len(running)))
            room.show(place, keys[len(place.keys) : draw.randint(len(place.keys), len(keys))])
            room.release(place)
        else:
            ids = [draw.randrange(2) for _ in range(draw.randint(1, 90))]
            keys = keys_of(ids)
            reservation = room.reserve(len(ids), keys[: (len(ids) - 1) // BLOCK])
            if reservation is not None:
                place, reused = reservation.place, reservation.reused
                assert (
                    reused == 0
                    or reservation.source + reused <= place.start
                    or place.start + place.size <= reservation.source
                )
                room.show(place, keys[: reused // BLOCK])
                running.append((place, keys))
        taken = sorted((place.start, place.size) for place in [*(place for place, _ in running), *room._kept])
        assert all(start + size <= other for (start, size), (other, _) in itertools.pairwise(taken))
        assert sum(size for _, size in taken) == room.filled and room.used == sum(place.size for place, _ in running)
    for place, _ in running:
        room.release(place)
    assert room.reserve(400, []) is not None


def test_keys_tell_images_ids_and_positions_apart_and_go_on() -> None:
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
