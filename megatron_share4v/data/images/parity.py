"""Parity check of image backends: distance of their pixels, and of the tower features, from those of pil_decoder.py.

N images, S the vision tower's input side, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from megatron_share4v.data.images.decoder import Backend, Decoder, open_decoder
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.sampling.blend import BlendedIndex, open_sample_reader
from megatron_share4v.data.store.index import Index
from megatron_share4v.errors import DataError, OpsError
from megatron_share4v.logging import get_logger

PROBES = 16
# Largest and mean error of uint8 values, and smallest cosine of the tower's features. DALI does not round between its
# two passes and repeats edge pixels where Pillow renormalises: errors of at most 7 on photographs and up to 24 at edges
# between black and white. The features change less than by rounding to bf16.
LIMITS: dict[Backend, tuple[int, float, float]] = {
    "pil": (0, 0.0, 1.0),
    "torch_u8": (2, 0.05, 0.999),
    "dali": (24, 0.5, 0.99),
}
# Where the aspect ratio is not kept, Pillow 13 may resize the height first; torch resizes the width first and rounds a
# fifth of the values the other way.
SQUARE_LIMITS = LIMITS | {"torch_u8": (2, 0.3, 0.999)}

Features = Callable[[torch.Tensor], torch.Tensor]
"""Function from pixels [N, S, S, 3] uint8 to features [N, D]."""


@dataclass(frozen=True)
class ParityResult:
    """Result of a parity check; errors are in uint8 values.

    by_reference: images that the backend left to Pillow; cosine: smallest of all images, None without a tower.
    """

    backend: Backend
    images: int
    max_error: int
    mean_error: float
    different: float
    by_reference: int
    cosine: float | None = None

    def __str__(self) -> str:
        cosine = "" if self.cosine is None else f", features' cosine at least {self.cosine:.6f}"
        return (
            f"image backend {self.backend}: against pil on {self.images} images at most {self.max_error} of 255 away, "
            f"mean {self.mean_error:.4f}, "
            f"{100 * self.different:.2f} % of values differ{cosine}; {self.by_reference} images left to pil"
        )


def measure_parity(
    backend: Backend, decoder: Decoder, files: Sequence[bytes], policy: ImagePolicy, *, features: Features | None = None
) -> ParityResult:
    """Decode `files` with `decoder` and with the reference; files that the reference cannot decode are left out.

    `features` is called twice in any case, with the remaining images: it may be a collective.
    """
    expected = open_decoder("pil", policy).decode_batch(files)
    got = decoder.decode_batch(files)
    kept = [position for position in range(len(files)) if position not in expected.failures]
    decoded, reference = got.pixels.cpu()[kept], expected.pixels[kept]
    error = (decoded.int() - reference.int()).abs()
    cosine = None
    if features is not None:
        found, wanted = (features(pixels).float() for pixels in (decoded, reference))
        cosine = float(cosine_similarity(found, wanted).min()) if len(found) else None
    return ParityResult(
        backend=backend,
        images=len(kept),
        max_error=int(error.max()) if kept else 0,
        mean_error=float(error.float().mean()) if kept else 0.0,
        different=float((error > 0).float().mean()) if kept else 0.0,
        by_reference=len(got.by_reference),
        cosine=cosine,
    )


def check_limits(result: ParityResult, policy: ImagePolicy) -> None:
    """Raise OpsError when the errors exceed the known limits of this backend under `policy`."""
    keeps_aspect_ratio = policy.resize == "shortest_edge" or policy.aspect_ratio == "pad"
    largest, mean, cosine = (LIMITS if keeps_aspect_ratio else SQUARE_LIMITS)[result.backend]
    if result.max_error > largest or result.mean_error > mean or (result.cosine is not None and result.cosine < cosine):
        raise OpsError(
            f"{result}; accepted are {largest}, a mean of {mean:g} and a cosine of {cosine:g}. Use data.image_backend "
            f"pil, or another version of the library"
        )


def read_probe_images(index: Index | BlendedIndex, *, count: int = PROBES) -> list[bytes]:
    """Read encoded images evenly spread over the data set, skipping unreadable ones."""
    rows = np.flatnonzero(index.rows["n_img"])
    store = open_sample_reader(index)
    files = []
    for row in rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)].tolist():
        try:
            image = store.read(row, with_image=True).image
        except DataError as error:
            get_logger().warning("image backend: not measured on %s", error)
            continue
        assert image is not None, "rows with n_img > 0 have an image"
        files.append(image)
    store.close()
    return files


def check_backend_parity(
    backend: Backend,
    policy: ImagePolicy,
    index: Index | BlendedIndex,
    *,
    device_index: int | None,
    features: Features | None = None,
) -> ParityResult | None:
    """Measure `backend` on some images of the data set; None for the reference itself.

    Raises OpsError when it is not installed, or exceeds its limits.
    """
    decoder = open_decoder(backend, policy, device_index=device_index)
    if backend == "pil":
        return None
    result = measure_parity(backend, decoder, read_probe_images(index), policy, features=features)
    check_limits(result, policy)
    return result
