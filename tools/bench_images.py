"""Benchmark of image decoding for tools/bench_data.py: images per second and core of each backend.

The reference is a DataLoader with Pillow and transformers' CLIPImageProcessorPil. Rounds are interleaved; the best
round of each counts. Time is CPU time of all processes, so other load on the machine does not matter. Our backends
return uint8 and normalise on the training device, which is not timed; pixels are compared after normalisation.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader

from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.decoder import Backend, open_decoder
from megatron_share4v.data.images.parity import measure_parity
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.loading.workers import ordered_map

POLICY = ImagePolicy(336, "pad")
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
BATCH, DISTINCT_IMAGES, MIN_IMAGES = 16, 64, 128
REFERENCE = "DataLoader + CLIPImageProcessorPil"


def bench_images(count: int, *, rounds: int = 3, workers: int = 2) -> dict[str, dict[str, float]]:
    """Measure each backend on `count` images, at least MIN_IMAGES.

    Returns images per second and core, ratio to the reference, and largest pixel error of each.
    """
    torch.set_num_threads(1)
    backends: list[Backend] = ["pil", "torch_u8"]
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        backends.append("dali")
    else:
        print('DALI is not installed (pip install -e ".[dali]"): left out', flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-images-") as folder:
        files = _write_images(Path(folder))
        count = max(count, MIN_IMAGES)
        paths = list(itertools.islice(itertools.cycle(files), count))
        readers: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            REFERENCE: partial(_read_with_transformers, paths, workers=workers)
        }
        for backend in backends:
            readers[backend] = partial(_read_with_backend, paths, backend, workers=workers)
        best = dict.fromkeys(readers, 0.0)
        for number in range(rounds):
            for name, read in readers.items():
                rate = _images_per_cpu_second(read(), batches=count // BATCH)
                best[name] = max(best[name], rate)
                print(f"round {number}: {name:<36} {rate:7.1f} images/s per core", flush=True)
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


def _write_images(folder: Path) -> list[Path]:
    """Write photograph-like JPEGs of about 100 kB."""
    paths = []
    for number in range(DISTINCT_IMAGES):
        width, height = SIZES[number % len(SIZES)]
        coarse = np.random.RandomState(number).randint(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number}.jpg")
        image.save(paths[-1], "JPEG", quality=90)
    return paths


@dataclass(frozen=True)
class _Decode:
    """Worker function of a backend: paths -> [BATCH, S, S, 3] uint8."""

    backend: Backend

    def __call__(self, paths: list[Path]) -> torch.Tensor:
        if "decoder" not in self.__dict__:
            self.__dict__["decoder"] = open_decoder(self.backend, POLICY)  # one decoder per process
        result = self.__dict__["decoder"].decode_batch([path.read_bytes() for path in paths])
        assert not result.failures, result.failures
        return result.pixels


def _read_with_backend(paths: list[Path], backend: Backend, *, workers: int) -> Iterator[torch.Tensor]:
    requests = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    return ordered_map(_Decode(backend), requests, num_workers=workers, prefetch=2)


class _LlavaDataset(torch.utils.data.Dataset):
    """Image processing of LLaVA's data set."""

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
        """Decode, pad to a square, resize and normalise: [3, S, S] float32."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), POLICY.pad_colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return torch.as_tensor(np.asarray(self._processor(square)["pixel_values"]))[0]


def _read_with_transformers(paths: list[Path], *, workers: int) -> Iterator[torch.Tensor]:
    return iter(DataLoader(_LlavaDataset(paths), batch_size=BATCH, num_workers=workers, prefetch_factor=2))


def _images_per_cpu_second(reader: Iterator[torch.Tensor], *, batches: int) -> float:
    """Return images per CPU second of this process and its descendants, after two warm-up batches per worker."""
    skipped = 4
    assert len(list(itertools.islice(reader, skipped))) == skipped
    started, done = _cpu_seconds(), 0
    # Stops before the last batch: the CPU times of workers are lost when they exit.
    for batch in itertools.islice(reader, batches - skipped - 1):
        done += len(batch)
    return done / (_cpu_seconds() - started)


def _cpu_seconds() -> float:
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def _check_bit_equal(files: list[Path]) -> None:
    official, pil_decoder = _LlavaDataset(files), open_decoder("pil", POLICY)
    for path in files:
        data = path.read_bytes()
        assert torch.equal(
            normalise(pil_decoder.decode_batch([data]).pixels, dtype=torch.float32, vision=VisionConfig())[0],
            official.process(data),
        ), path
    print(f"pil: bit-equal to CLIPImageProcessorPil on {len(files)} images, after normalising")
