"""Image backends compared with the reference on many formats, damaged files and odd shapes; and the parity check."""

import io
import struct
import sys
import zlib
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.decoder import PerImageDecoder, backend_version, open_decoder
from megatron_share4v.data.images.parity import (
    ParityResult,
    check_backend_parity,
    check_limits,
    measure_parity,
    read_probe_images,
)
from megatron_share4v.data.images.pixels import mean_colour_images, normalise
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.errors import OpsError

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="extra [dali] is not installed")
GRAY = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
POLICIES = [
    ImagePolicy(28, "pad"),
    ImagePolicy(28, "square"),
    ImagePolicy(45, "pad"),
    ImagePolicy(28, "square", resample="bilinear", resize="square", **GRAY),
    ImagePolicy(28, "pad", resize_edge=36, resample="lanczos", **GRAY),
    ImagePolicy(28, "square", resize_edge=32),
]
BACKENDS = ["torch_u8", pytest.param("dali", marks=needs_dali)]
LARGEST = {"torch_u8": 2, "dali": 24}
MEAN = {"torch_u8": 0.05, "dali": 2.5}  # largest error: dithered black and white, tiny images


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Encode a smooth picture; on noise the resampling of the backends differs too much."""
    noise = np.random.RandomState(seed).randint(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png(width: int, height: int, *, bits: int, colour: int, rows: bytes) -> bytes:
    """Encode a PNG of a kind that Pillow does not write, or with a wrong header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rgb16() -> bytes:
    values = np.asarray(smooth(40, 30)).astype(">u2") * 257
    return png(40, 30, bits=16, colour=2, rows=b"".join(b"\0" + row.tobytes() for row in values))


def good() -> dict[str, bytes]:
    image = smooth(61, 40)
    gray16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    palette = image.quantize(32)
    return {
        "jpeg": saved(image, "JPEG"),
        "portrait": saved(smooth(40, 61), "JPEG"),
        "tall": saved(smooth(9, 200), "PNG"),
        "tiny": saved(smooth(3, 2), "PNG"),
        "progressive": saved(image, "JPEG", progressive=True),
        "4:4:4": saved(image, "JPEG", subsampling=0),
        "gray": saved(image.convert("L"), "JPEG"),
        "cmyk": saved(image.convert("CMYK"), "JPEG"),
        "exif": saved(image, "JPEG", exif=exif(6)),
        "png": saved(image, "PNG"),
        "1-bit": saved(image.convert("1"), "PNG"),
        "palette": saved(palette, "PNG"),
        "transparent palette": saved(palette, "PNG", transparency=3),
        "alpha": saved(image.convert("RGBA"), "PNG"),
        "gray alpha": saved(image.convert("LA"), "PNG"),
        "16-bit gray": saved(gray16, "PNG"),
        "16-bit": rgb16(),
        "gif": saved(palette, "GIF"),
        "webp": saved(image, "WEBP"),
        "lossless webp": saved(image, "WEBP", lossless=True),
        "webp with alpha": saved(image.convert("RGBA"), "WEBP"),
        "moving webp": saved(image, "WEBP", save_all=True, append_images=[smooth(61, 40, 1)]),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF"),
        "jpeg 2000": saved(image, "JPEG2000"),
    }


def bad() -> dict[str, bytes]:
    jpeg, whole = saved(smooth(64, 64), "JPEG"), saved(smooth(64, 64), "PNG")
    crc = bytearray(whole)
    crc[60] ^= 255
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    return {
        "zero bytes": b"",
        "zeros": bytes(500),
        "text": b"<html>404</html>",
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "jpeg without its end": jpeg[:-20],
        "header of a jpeg": jpeg[:30],
        "half a png": whole[: len(whole) // 2],
        "png with a wrong crc": bytes(crc),
        "bomb": png(60000, 60000, bits=8, colour=2, rows=b""),
        "ribbon": png(20_100, 100, bits=8, colour=2, rows=b""),
        "no width": png(0, 10, bits=8, colour=2, rows=b""),
        "eps": eps.getvalue(),
        "32 bits": saved(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"),
    }


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formats(backend: str, policy: ImagePolicy) -> None:
    files = good()
    expected = open_decoder("pil", policy).decode_batch(list(files.values()))
    got = open_decoder(backend, policy).decode_batch(list(files.values()))
    assert expected.failures == {} and got.failures == {}
    assert got.pixels.shape == (len(files), policy.image_size, policy.image_size, 3) and got.pixels.dtype == torch.uint8
    error = (got.pixels.int() - expected.pixels.int()).abs().flatten(1)
    assert {name: int(e.max()) for name, e in zip(files, error) if e.max() > LARGEST[backend]} == {}
    # Pillow 13 may resize the height first, torch never does.
    mean = 0.3 if backend == "torch_u8" and policy.resize == "square" else MEAN[backend]
    assert {name: float(e.float().mean()) for name, e in zip(files, error) if e.float().mean() > mean} == {}
    left = [list(files)[position] for position in got.by_reference]
    expected_left = {"dali": ["16-bit gray", "gif"], "torch_u8": list(files) if policy.resample == "lanczos" else []}
    assert left == expected_left[backend]


@pytest.mark.parametrize("backend", ["pil", *BACKENDS])
def test_damage_is_named_and_harms_nobody_else(backend: str) -> None:
    policy = POLICIES[0]
    sound, broken = saved(smooth(50, 40), "JPEG"), bad()
    files = [sound, *(data for one in broken.values() for data in (one, sound))]
    decoder = open_decoder(backend, policy)
    result = decoder.decode_batch(files)
    assert sorted(result.failures) == list(range(1, len(files), 2))
    assert all(reason.startswith("image ") for reason in result.failures.values())
    alone = decoder.decode_batch([sound]).pixels[0]
    for position, pixels in enumerate(result.pixels):
        assert torch.equal(pixels, mean_colour_images(1, policy)[0] if position % 2 else alone), position
    assert decoder.decode_batch([]).pixels.shape == (0, 28, 28, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_strips(backend: str) -> None:
    policy = ImagePolicy(28, "pad")
    strips = [smooth(600, 10), smooth(10, 600), smooth(60, 10_000), smooth(10_000, 60), smooth(1, 200), smooth(200, 1)]
    files = [saved(image, "PNG") for image in strips]
    expected, got = (open_decoder(name, policy).decode_batch(files) for name in ("pil", backend))
    assert expected.failures == {} and got.failures == {}
    assert (got.pixels.int() - expected.pixels.int()).abs().max() <= LARGEST[backend]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("backend", ["pil", *BACKENDS])
def test_exif_orientation_is_applied_if_the_policy_says_so(backend: str, orientation: int) -> None:
    policy = ImagePolicy(28, "pad", "exif")
    image = smooth(50, 30)
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        tagged = saved(image, form, exif=exif(orientation))
        upright = saved(ImageOps.exif_transpose(Image.open(io.BytesIO(tagged))), "PNG")
        got, expected = open_decoder(backend, policy).decode_batch([tagged, upright]).pixels
        assert (got.int() - expected.int()).abs().max() <= LARGEST.get(backend, 0), form


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiff_orientation_is_always_applied(backend: str) -> None:
    """Pillow turns a TIFF when it loads it, so the official pipeline does too."""
    files = [saved(smooth(50, 30), "TIFF", exif=exif(6))]
    expected, got = (open_decoder(name, POLICIES[0]).decode_batch(files) for name in ("pil", backend))
    assert (got.pixels.int() - expected.pixels.int()).abs().max() <= LARGEST[backend]


@pytest.mark.parametrize("backend", ["pil", *BACKENDS])
def test_exif_orientation_changes_nothing(backend: str) -> None:
    image = smooth(50, 30)
    plain, turned = (
        open_decoder(backend, POLICIES[0])
        .decode_batch([saved(image, "JPEG"), saved(image, "JPEG", exif=exif(6))])
        .pixels
    )
    assert torch.equal(plain, turned)


def test_the_mean_colour_is_the_towers_zero() -> None:
    assert normalise(mean_colour_images(2, POLICIES[0]), dtype=torch.float32, vision=VisionConfig()).abs().max() < 0.02


@needs_dali
def test_the_gpu_graph_is_the_cpu_graph_but_for_the_decoder() -> None:
    from megatron_share4v.data.images.dali_decoder import make_graph

    on_cpu, on_gpu = (
        make_graph(POLICIES[0], decoding=device, device_index=None, batch_size=4) for device in ("cpu", "mixed")
    )
    serialized = on_gpu.serialize()
    assert b"mixed" in serialized and b"mixed" not in on_cpu.serialize()
    assert b"adjust_orientation" in serialized and b"jpeg_fancy_upsampling" in serialized


@needs_dali
def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(OpsError, match="GPU 0 cannot be used"):
        open_decoder("dali", POLICIES[0], device_index=0)


def test_a_backend_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "megatron_share4v.data.images.dali_decoder", raising=False)
    with pytest.raises(OpsError, match=r'pip install -e "\.\[dali\]"'):
        open_decoder("dali", POLICIES[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gate_measures_pixels_and_features(backend: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    policy = ImagePolicy(56, "pad")
    files = [saved(smooth(120 + 7 * n, 90 + 5 * n, n), "JPEG") for n in range(6)] + [
        b"",
        saved(smooth(50, 40).quantize(16), "GIF"),
    ]
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=56,
            patch_size=14,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    ).eval()
    with torch.no_grad():
        result = measure_parity(
            backend,
            open_decoder(backend, policy),
            files,
            policy,
            features=lambda pixels: (
                tower(
                    pixel_values=normalise(pixels, dtype=torch.float32, vision=VisionConfig()),
                    output_hidden_states=True,
                )
                .hidden_states[-2]
                .flatten(1)
            ),
        )
    assert result.images == 7 and result.max_error <= LARGEST[backend] and result.mean_error <= MEAN[backend]
    assert result.cosine > 0.999 and 0 < result.different < 0.5
    assert result.by_reference == (1 if backend == "dali" else 0)
    assert "features' cosine at least 0.99" in str(
        result
    ) and f"image backend {backend}: against pil on 7 images" in str(result)
    check_limits(result, policy)


def test_the_gate_refuses_what_is_too_far_off(prepared) -> None:
    policy = POLICIES[0]
    assert check_backend_parity("pil", policy, prepared.index, device_index=None) is None
    passed = check_backend_parity("torch_u8", policy, prepared.index, device_index=None)
    assert isinstance(passed, ParityResult) and passed.images == len(read_probe_images(prepared.index)) == 16
    nearest = PerImageDecoder(
        lambda data, policy: np.array(
            Image.open(io.BytesIO(data)).convert("RGB").resize((28, 28), Image.Resampling.NEAREST)
        ),
        policy,
    )
    with pytest.raises(OpsError, match="accepted are 2, a mean of 0.05"):
        check_limits(measure_parity("torch_u8", nearest, read_probe_images(prepared.index), policy), policy)
    with pytest.raises(OpsError, match="accepted are 24"):
        check_limits(replace(passed, backend="dali", mean_error=0.6), policy)
    with pytest.raises(OpsError, match="a cosine of 0.999"):
        check_limits(replace(passed, cosine=0.998), policy)


def test_rounding_of_other_passes_is_accepted_only_where_the_aspect_ratio_changes() -> None:
    result = ParityResult("torch_u8", images=1, max_error=2, mean_error=0.2, different=0.2, by_reference=0)
    check_limits(result, ImagePolicy(28, "square", resize="square"))
    for kept in (ImagePolicy(28, "pad", resize="square"), ImagePolicy(28, "square"), ImagePolicy(28, "pad")):
        with pytest.raises(OpsError, match=r"a mean of 0\.05"):
            check_limits(result, kept)


def test_libraries_are_named() -> None:
    assert backend_version("pil").startswith("pillow ") and backend_version("torch_u8").endswith(torch.__version__)
