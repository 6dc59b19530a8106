"""The part of tools/bench_data.py that measures decoding: images per second and core, of each backend through our workers, and of a DataLoader
with Pillow and transformers' CLIPImageProcessorPil. Interleaved in one run; the best round of each counts.

Time is processor time of all processes, so that a busy machine does not decide. Ours hands over uint8 and normalises on the training device,
which is not timed; the pixels are compared after it.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader

from megatron_share4v.data.images.decoder import Backend, open_decoder
from megatron_share4v.data.images.parity import measure_parity
from megatron_share4v.data.images.policy import PAD_COLOUR, ImagePolicy, normalise
from megatron_share4v.data.loading.workers import ordered_map

POLICY = ImagePolicy(336, "pad")
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
BATCH, DIFFERENT, LEAST = 16, 64, 128
REFERENCE = "DataLoader + CLIPImageProcessorPil"


def bench_images(count: int, *, rounds: int = 3, workers: int = 2) -> dict[str, dict[str, float]]:
    """Images per second and core of each way to read `count` images (LEAST at least), its ratio to the reference, and how far its pixels are from it."""
    torch.set_num_threads(1)
    backends: list[Backend] = ["pil", "torch_u8"]
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        backends.append("dali")
    else:
        print('DALI is not installed (pip install -e ".[dali]"): left out', flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-images-") as name:
        files = _write_pictures(Path(name))
        count = max(count, LEAST)
        paths = list(itertools.islice(itertools.cycle(files), count))
        ways: dict[str, Callable[[], Iterator[object]]] = {REFERENCE: lambda: _reference(paths, workers=workers)}
        for backend in backends:
            ways[backend] = lambda backend=backend: _ours(paths, backend, workers=workers)
        best = dict.fromkeys(ways, 0.0)
        for number in range(rounds):
            for way, make in ways.items():
                rate = _rate(make(), batches=count // BATCH)
                best[way] = max(best[way], rate)
                print(f"round {number}: {way:<36} {rate:7.1f} images/s per core", flush=True)
        _check_bit_equal(files)
        encoded = [path.read_bytes() for path in files]
        found = {REFERENCE: {"images_per_core_s": best[REFERENCE], "ratio": 1.0}}
        for backend in backends:
            result = measure_parity(backend, open_decoder(backend, POLICY), encoded, POLICY)
            found[backend] = {
                "images_per_core_s": best[backend],
                "ratio": best[backend] / best[REFERENCE],
                "max_error": result.max_error,
            }
            print(
                f"{backend:<10} {best[backend]:7.1f} images/s per core, {found[backend]['ratio']:.2f} x the "
                f"reference; {result}"
            )
    return found


def _write_pictures(folder: Path) -> list[Path]:
    """Photograph-like JPEGs of about 100 kB."""
    paths = []
    for number in range(DIFFERENT):
        width, height = SIZES[number % len(SIZES)]
        coarse = np.random.RandomState(number).randint(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number}.jpg")
        image.save(paths[-1], "JPEG", quality=90)
    return paths


@dataclass(frozen=True)
class _Decode:
    """Paths -> [BATCH, S, S, 3] uint8; what one of our workers runs."""

    backend: Backend

    def __call__(self, paths: list[Path]) -> torch.Tensor:
        if "decoder" not in self.__dict__:
            self.__dict__["decoder"] = open_decoder(self.backend, POLICY)  # one for each process
        result = self.__dict__["decoder"].decode_batch([path.read_bytes() for path in paths])
        assert not result.failures, result.failures
        return result.pixels


def _ours(paths: list[Path], backend: Backend, *, workers: int) -> Iterator[object]:
    requests = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    return ordered_map(_Decode(backend), requests, num_workers=workers, prefetch=2)


class _Official(torch.utils.data.Dataset):
    """What LLaVA's data set does with an image."""

    def __init__(self, paths: list[Path]) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        size = POLICY.image_size
        self._paths = paths
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.process(self._paths[number].read_bytes())

    def process(self, data: bytes) -> torch.Tensor:
        """[3, S, S] float32."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return torch.as_tensor(np.asarray(self._processor(square)["pixel_values"]))[0]


def _reference(paths: list[Path], *, workers: int) -> Iterator[object]:
    return iter(DataLoader(_Official(paths), batch_size=BATCH, num_workers=workers, prefetch_factor=2))


def _rate(batches_of: Iterator[object], *, batches: int) -> float:
    """Images per processor second, of this process and its descendants, after two batches for each worker to start with."""
    skipped = 4
    assert len(list(itertools.islice(batches_of, skipped))) == skipped
    started, done = _processor_seconds(), 0
    # Not to the very end, where the workers and their times would be gone.
    for batch in itertools.islice(batches_of, batches - skipped - 1):
        done += len(batch)
    return done / (_processor_seconds() - started)


def _processor_seconds() -> float:
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def _check_bit_equal(files: list[Path]) -> None:
    official, ours = _Official(files), open_decoder("pil", POLICY)
    for path in files:
        data = path.read_bytes()
        assert torch.equal(
            normalise(ours.decode_batch([data]).pixels, dtype=torch.float32)[0], official.process(data)
        ), path
    print(f"pil: bit-equal to CLIPImageProcessorPil on {len(files)} images, after normalising")
