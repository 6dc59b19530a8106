"""Pixels bit-equal to LLaVA's padding with CLIPImageProcessorPil; rejection of damaged and oversized files."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.pil_decoder import FILTERS, decode, validate_image
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.images.policy import ImagePolicy, check_image_size
from megatron_share4v.errors import DataError

SIZES = [(64, 48), (37, 91), (91, 37), (55, 55), (28, 28), (13, 14), (200, 31), (1, 3)]
MODES = [
    ("RGB", "JPEG"),
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("LA", "PNG"),
    ("1", "PNG"),
    ("RGB", "WEBP"),
]
MODES += [("RGB", "BMP"), ("P", "GIF"), ("L", "TIFF")]


def _reference(data: bytes, *, size: int, aspect_ratio: str) -> torch.Tensor:
    """Compute the vision tower input of the official code."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if aspect_ratio == "pad":
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), ImagePolicy(size).pad_colour)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"]))


def _decoded(data: bytes, *, size: int, aspect_ratio: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pixels = decode(data, ImagePolicy(image_size=size, aspect_ratio=aspect_ratio))
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    return normalise(torch.tensor(pixels)[None], dtype=dtype, vision=VisionConfig())


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("size", [28, 45])
def test_bit_equal_to_the_reference_at_odd_sizes(picture, aspect_ratio: str, size: int):
    for number, image_size in enumerate(SIZES):
        data = picture(number, size=image_size)
        assert torch.equal(
            _decoded(data, size=size, aspect_ratio=aspect_ratio), _reference(data, size=size, aspect_ratio=aspect_ratio)
        ), image_size


@pytest.mark.parametrize("mode, format", MODES)
def test_bit_equal_to_the_reference_for_many_formats(picture, mode: str, format: str):
    data = picture(3, mode=mode, size=(61, 40), format=format)
    for aspect_ratio in ("pad", "square"):
        assert torch.equal(
            _decoded(data, size=28, aspect_ratio=aspect_ratio), _reference(data, size=28, aspect_ratio=aspect_ratio)
        )


def test_bit_equal_at_the_real_size(picture):
    data = picture(1, size=(640, 427), format="JPEG")
    assert torch.equal(_decoded(data, size=336, aspect_ratio="pad"), _reference(data, size=336, aspect_ratio="pad"))


def test_bf16_is_the_rounded_fp32(picture):
    data = picture(1, size=(50, 60))
    exact = _decoded(data, size=28, aspect_ratio="pad")
    assert torch.equal(_decoded(data, size=28, aspect_ratio="pad", dtype=torch.bfloat16), exact.bfloat16())
    assert normalise(
        torch.empty(0, 28, 28, 3, dtype=torch.uint8), dtype=torch.float32, vision=VisionConfig()
    ).shape == (0, 3, 28, 28)


def test_exif_orientation_is_ignored():
    pixels = np.random.RandomState(0).randint(0, 256, (20, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(plain, "PNG")
    Image.fromarray(pixels).save(turned, "PNG", exif=exif)
    policy = ImagePolicy(image_size=28)
    assert np.array_equal(decode(plain.getvalue(), policy), decode(turned.getvalue(), policy))


def test_16_bit_gray_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), ImagePolicy(image_size=28))
    assert np.array_equal(pixels[..., 0], np.round(values / 257).astype(np.uint8))


IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
FAMILIES = {
    "siglip": ImagePolicy(27, resize="square", image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)),
    "siglip2": ImagePolicy(
        24, resample="bilinear", resize="square", image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
    ),
    "dinov2": ImagePolicy(28, resize_edge=32, **IMAGENET),
    "clip, bilinear": ImagePolicy(28, resample="bilinear"),
    "lanczos": ImagePolicy(28, resample="lanczos", resize_edge=45, **IMAGENET),
    "square, lanczos": ImagePolicy(20, resample="lanczos", resize="square"),
}


def _processor(policy: ImagePolicy) -> object:
    """Make the image processor of a family with these values."""
    size = {"height": policy.image_size, "width": policy.image_size}
    values = {
        "resample": FILTERS[policy.resample], "image_mean": list(policy.image_mean), "image_std": list(policy.image_std)
    }  # fmt: skip
    if policy.resize == "square":
        return SiglipImageProcessorPil(size=size, **values)
    edge = policy.resize_edge or policy.image_size
    return BitImageProcessorPil(size={"shortest_edge": edge}, crop_size=size, **values)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_every_family_equal_transformers(picture, family: str, aspect_ratio: str):
    policy = replace(FAMILIES[family], aspect_ratio=aspect_ratio)
    vision = VisionConfig(image_mean=policy.image_mean, image_std=policy.image_std)
    processor = _processor(policy)
    for number, size in enumerate([*SIZES, (333, 250), (120, 400)]):
        data = picture(number, size=size)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if aspect_ratio == "pad":
            square = Image.new("RGB", (max(size), max(size)), tuple(int(mean * 255) for mean in policy.image_mean))
            square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
            image = square
        pixels = torch.tensor(decode(data, policy))[None]
        plain = torch.as_tensor(np.asarray(processor(image, do_rescale=False, do_normalize=False)["pixel_values"]))
        assert torch.equal(pixels.permute(0, 3, 1, 2), plain), size
        values = torch.as_tensor(np.asarray(processor(image)["pixel_values"]))
        assert torch.equal(normalise(pixels, dtype=torch.float32, vision=vision), values), size


@pytest.mark.parametrize("policy", [replace(FAMILIES["siglip"], image_size=384), ImagePolicy(224, resize_edge=256)])
def test_other_families_at_the_real_size(picture, policy: ImagePolicy):
    for size in ((640, 427), (427, 640)):
        data = picture(1, size=size, format="JPEG")
        image, processor = Image.open(io.BytesIO(data)), _processor(policy)
        plain = torch.as_tensor(np.asarray(processor(image, do_rescale=False, do_normalize=False)["pixel_values"]))
        pixels = torch.tensor(decode(data, replace(policy, aspect_ratio="square")))[None]
        assert torch.equal(pixels.permute(0, 3, 1, 2), plain), size


def test_policy_is_made_of_the_tower_and_the_data_section():
    vision = VisionConfig(
        image_size=384, resample="lanczos", resize_edge=400, image_mean=(0.5, 0.25, 0.999), image_std=(0.1, 0.2, 0.3)
    )
    data = DataConfig(train="shards", tokenizer="t", image_aspect_ratio="square", image_orientation="exif")
    policy = ImagePolicy.from_config(vision, data)
    assert policy == ImagePolicy(
        384, "square", "exif", "lanczos", "shortest_edge", 400, (0.5, 0.25, 0.999), (0.1, 0.2, 0.3)
    )
    assert policy.pad_colour == (127, 63, 254)
    assert ImagePolicy.from_config(VisionConfig(), DataConfig(train="s", tokenizer="t")) == ImagePolicy(336)
    assert ImagePolicy(336).pad_colour == (122, 116, 104)
    assert str(policy) == "short side resized to 400 (lanczos), centre 384 x 384 cropped"
    assert str(FAMILIES["siglip"]) == "padded to a square with (127, 127, 127), resized to 27 x 27 (bicubic)"


def _png_of(width: int, height: int) -> bytes:
    """Encode a PNG whose header has a size other than that of its data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(9000, 9000), (60000, 60000), (20100, 100)])
def test_absurd_sizes_are_refused_from_the_header(width: int, height: int):
    with pytest.raises(DataError, match="pixels|Bomb"):
        decode(_png_of(width, height), ImagePolicy(image_size=28))


def test_size_limits():
    check_image_size(8000, 8000)
    check_image_size(20_000, 100)
    check_image_size(1, 200)
    for size in ((8001, 8000), (20_001, 100), (1, 201), (0, 5)):
        with pytest.raises(DataError, match="accepted|times the other"):
            check_image_size(*size)


def test_damaged_files_are_refused(picture):
    jpeg, png = picture(2, size=(64, 64), format="JPEG"), picture(2, size=(64, 64))
    broken_crc = bytearray(png)
    broken_crc[60] ^= 255
    for data in (
        jpeg[: len(jpeg) // 2],
        jpeg[:-20],
        jpeg[:30],
        png[: len(png) // 2],
        bytes(broken_crc),
        b"",
        b"<html></html>",
        bytes(500),
    ):
        with pytest.raises(DataError, match="cannot be (read|decoded)"):
            validate_image(data)


def test_32_bit_pixels_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(buffer, "TIFF")
    with pytest.raises(DataError, match="32 bits per channel"):
        validate_image(buffer.getvalue())


def test_formats_that_are_no_photographs_are_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    with pytest.raises(DataError, match="image is in EPS format; accepted are JPEG"):
        validate_image(buffer.getvalue())


def test_inspect_tells_size_and_extension(picture):
    header = validate_image(picture(0, size=(30, 20), format="JPEG"))
    assert (header.width, header.height, header.extension) == (30, 20, "jpg")
    assert [validate_image(picture(0, format=name)).extension for name in ("PNG", "WEBP", "GIF")] == [
        "png",
        "webp",
        "gif",
    ]
