"""Benchmark of preparing a data set for tools/bench_data.py: annotations, shards, index, records with images."""

from __future__ import annotations

import io
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_share4v.data.images.pil_decoder import ImageHeader
from megatron_share4v.data.prepare.annotations import AnnotationFile, Entry
from megatron_share4v.data.prepare.validate import Accepted, CheckedImage, CheckedText
from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
from megatron_share4v.data.store.index import Index

CAPTION = (
    "The image shows a small red circle to the left of a large blue square, "
    "and above both of them hangs a bright yellow star. "
)


@dataclass(frozen=True)
class AcceptAll:
    """Validator that accepts every record unread, to measure everything except images and tokenisation."""

    def __call__(self, request: tuple[Entry, bool]) -> Accepted:
        content, known = request[0].content, request[1]
        assert isinstance(content, dict)
        header = ImageHeader(width=640, height=480, extension="jpg")
        digest = hash(content["id"])
        image = None if known else CheckedImage(b"", 100_000, digest & 0xFFFFFFFF, header, archive=None, offset=0)
        identity = digest & (1 << 63) - 1
        text = CheckedText(words=140, n_tok=200, n_lab=190, full_tok=200, full_lab=190, identity=identity)
        return Accepted(content["id"], content["image"], image, text)


def bench_prepare(directory: Path, *, records: int, tokenizer: Path) -> dict[str, float]:
    """Measure and print each stage of preparing `records` synthetic records of ShareGPT4V-PT's length."""
    path, images = directory / "annotations.json", directory / "images"
    images.mkdir()
    found: dict[str, float] = {"records": records}
    with _stage("write the annotations", found, "write"):
        _write_annotations(path, records)
    found["annotations_bytes"] = path.stat().st_size
    with _stage(f"read {path.stat().st_size / 1e9:.2f} GB of annotations as a stream", found, "read"):
        count = sum(1 for _ in AnnotationFile(path))
    assert count == records, "the reader lost records"
    options = PrepareOptions(
        annotations=path, images=images, output=directory / "out", tokenizer=tokenizer, template="plain", in_place=True
    )
    with _stage("build text shards, index and list of duplicates", found, "build"):
        prepare(options, validator=AcceptAll())
    with _stage("open and verify the index", found, "open"):
        index = Index.open(options.output)
    assert len(index) == records, "the index lost samples"
    found["index_bytes"] = sum((options.output / name).stat().st_size for name in ("index.npy", "keys.npy"))
    return found


def bench_with_images(directory: Path, *, images: int, tokenizer: Path) -> dict[str, float]:
    """Measure records per second and core of preparing with images: verify and copy 640 x 480 photographs, tokenise.

    Measured in CPU time of one process, so other load on the machine does not matter.
    """
    folder = directory / "with-images" / "sam" / "images"
    folder.mkdir(parents=True)
    encoded = [_photograph(number) for number in range(8)]
    for number in range(images):
        # JPEG readers stop at the end marker; the appended number makes the files distinct.
        (folder / f"sa_{number}.jpg").write_bytes(encoded[number % len(encoded)] + str(number).encode())
    path = directory / "few.json"
    _write_annotations(path, images)
    options = PrepareOptions(
        annotations=path,
        images=directory / "with-images",
        output=directory / "few",
        tokenizer=tokenizer,
        template="plain",
    )
    started = time.process_time()
    prepare(options)
    rate = images / (time.process_time() - started)
    size = np.mean([len(data) for data in encoded]) / 1000
    print(f"prepare with images of {size:.0f} kB: {rate:.0f} records per second of one core", flush=True)
    return {"images": images, "records_per_core_s": round(rate, 1)}


def _photograph(seed: int) -> bytes:
    """Encode a JPEG with the file size of a real photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 8, (480, 640, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _write_annotations(path: Path, records: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            record = {
                "id": f"sa_{number}",
                "image": f"sam/images/sa_{number}.jpg",
                "conversations": [
                    {"from": "human", "value": "What do you see happening in this image?\n<image>"},
                    {"from": "gpt", "value": f"{number}: {CAPTION * 7}"},
                ],
            }
            file.write(("[" if number == 0 else ",\n") + json.dumps(record))
        file.write("]")


@contextmanager
def _stage(description: str, found: dict[str, float], name: str) -> Iterator[None]:
    started, started_cpu = time.monotonic(), time.process_time()
    yield
    seconds, cpu = time.monotonic() - started, time.process_time() - started_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found |= {f"{name}_s": round(seconds, 2), f"{name}_cpu_s": round(cpu, 2), f"{name}_peak_mib": round(peak)}
    print(
        f"{description}: {seconds:.1f} s, {cpu:.1f} s of CPU ({found['records'] / cpu:.0f} records/s), peak memory "
        f"{peak:.0f} MiB",
        flush=True,
    )
