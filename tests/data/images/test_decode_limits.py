"""Images that are small but slow: refused by their scans, segments or CPU time; ordinary images are read."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from slow_images import BOMBS, SLOW, chunk_bomb, comment_bomb, scan_bomb, segment_bomb

from megatron_share4v.data.images import decode_limits
from megatron_share4v.data.images.decode_limits import MAX_SCANS, count_jpeg_scans
from megatron_share4v.data.images.decoder import open_decoder
from megatron_share4v.data.images.pil_decoder import decode, open_header, validate_image
from megatron_share4v.data.images.policy import ImagePolicy, OversizedImage
from megatron_share4v.data.prepare.image_files import EncodedImage
from megatron_share4v.data.prepare.validate import OVERSIZED, Rejected, check_image

POLICY = ImagePolicy(28)


def noise(form: str, **options: object) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", BOMBS)
def test_refused_before_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = BOMBS[name]()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    start = time.thread_time()
    for read in (open_header, validate_image, lambda data: decode(data, POLICY)):
        with pytest.raises(OversizedImage, match=r"is a JPEG of .*; (save it anew|accepted are).*leave it out"):
            read(data)
    assert time.thread_time() - start < 1  # 0.02 s on an idle machine; decoding the first would take a minute
    for backend in ("pil", "torch_u8"):
        assert "is a JPEG of" in open_decoder(backend, POLICY).decode_batch([data]).failures[0]


@pytest.mark.parametrize("name", SLOW)
def test_refused_when_its_cpu_time_is_spent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_limits, "MAX_CPU_S", 0.1)
    data, start = SLOW[name](), time.thread_time()
    with pytest.raises(OversizedImage, match=r"takes more than 0\.1 s of CPU time to decode"):
        decode(data, POLICY)
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    ("data", "scans"),
    [
        (noise("JPEG"), 1),
        (noise("JPEG", progressive=True), 10),
        (noise("JPEG", progressive=True, restart_marker_blocks=1), 10),
        (noise("JPEG", quality=100, subsampling=0, comment=b"\xff\xda" * 300), 1),
        (noise("MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]), 1),
        (noise("JPEG") + noise("JPEG"), 1),
        (noise("JPEG")[:-700], 1),
        (scan_bomb(MAX_SCANS - 6), MAX_SCANS),
        (noise("PNG"), 0),
        (b"", 0),
    ],
)
def test_scans_are_counted_by_markers(data: bytes, scans: int) -> None:
    assert count_jpeg_scans(data) == scans


@pytest.mark.parametrize("data", [scan_bomb(20), segment_bomb(300), comment_bomb(300), chunk_bomb(300)])
def test_unusual_but_quick_images_are_read(data: bytes) -> None:
    assert decode(data, POLICY).shape == (28, 28, 3)


def test_preparation_counts_them_as_oversized(tmp_path: Path) -> None:
    verdict = check_image(EncodedImage(BOMBS["scans"](), None, 0), keep_bytes=True)
    assert isinstance(verdict, Rejected) and verdict.kind == OVERSIZED and "100 scans" in verdict.reason
