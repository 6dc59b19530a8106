"""Decoding in processes: the same pixels, a deadline, processes that die, and a pool that is closed."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from slow_images import obey

from megatron_share4v.data.images.decode_pool import DecodePool, DecodeRequest
from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.images.policy import ImagePolicy, OversizedImage
from megatron_share4v.errors import DataError

POLICY = ImagePolicy(28)


def picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(processes=1, timeout_s=2.0, function=obey)
    yield pool
    pool.close()


def test_pixels_equal_those_of_the_decoder() -> None:
    pool = DecodePool(processes=2, timeout_s=60)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: pool.decode(DecodeRequest(picture(seed), POLICY)), range(8)))
    assert all(np.array_equal(pixels, decode(picture(seed), POLICY)) for seed, pixels in enumerate(found))
    with pytest.raises(OversizedImage, match="image is 50 x 40 pixels; accepted are 1 to 1999"):
        pool.decode(DecodeRequest(picture(), POLICY, max_pixels=1999))
    with pytest.raises(DataError, match=r"cannot be read \(4 bytes"):
        pool.decode(DecodeRequest(b"text", POLICY))
    pool.close()


def test_warnings_of_pillow_do_not_reach_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture())).convert("P").save(file, "PNG", transparency=b"\x00\x80\x00")
    with pytest.warns(UserWarning, match="Transparency"):
        decode(file.getvalue(), POLICY)
    pool = DecodePool(processes=1, timeout_s=60)
    pool.decode(DecodeRequest(file.getvalue(), POLICY))
    pool.close()
    assert capfd.readouterr().err == ""


def test_a_slow_image_is_given_up_once(pool: DecodePool) -> None:
    pool.start()
    start = time.monotonic()
    with pytest.raises(OversizedImage, match=r"could not be decoded within 2 s"):
        pool.decode(DecodeRequest(b"hang", POLICY))
    assert time.monotonic() - start < 20  # it was not asked again, and nobody waits for the ten minutes
    assert bytes(pool.decode(DecodeRequest(b"next", POLICY))) == b"next"


def test_processes_do_not_import_torch(pool: DecodePool) -> None:
    assert bytes(pool.decode(DecodeRequest(b"torch", POLICY))) == b"torch is not imported"


def test_an_image_that_ends_its_process_is_refused(pool: DecodePool) -> None:
    with pytest.raises(DataError, match="of 3 bytes ended the process that decoded it, twice"):
        pool.decode(DecodeRequest(b"die", POLICY))
    assert bytes(pool.decode(DecodeRequest(b"next", POLICY))) == b"next"


def test_closing_ends_a_decode_in_progress() -> None:
    pool = DecodePool(processes=1, timeout_s=600, function=obey)
    pool.start()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.decode, DecodeRequest(b"hang", POLICY))
        time.sleep(0.2)
        pool.close()
        with pytest.raises(DataError, match="have been closed"):
            waiting.result(20)
    with pytest.raises(DataError, match="have been closed"):
        pool.decode(DecodeRequest(b"next", POLICY))
