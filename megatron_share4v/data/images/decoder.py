"""Interface of the image decoders: encoded files in, uint8 pixels out, with failures returned instead of raised.

`pil` is the reference; parity.py measures the others against it. N images, S the vision tower's input side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch

from megatron_share4v.data.images import pil_decoder, torch_decoder
from megatron_share4v.data.images.pixels import DecodedBatch, mean_colour_images
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.errors import DataError, OpsError

Backend = Literal["pil", "torch_u8", "dali"]


class Decoder(Protocol):
    """Decoder of the images of one micro-batch; the result for an image does not depend on the others."""

    def decode_batch(self, files: Sequence[bytes]) -> DecodedBatch:
        """Decode N encoded files to pixels and failures."""


class PerImageDecoder:
    """Decoder based on a function for one image that raises DataError; `by_reference`: the function is Pillow's."""

    def __init__(
        self, function: Callable[[bytes, ImagePolicy], np.ndarray], policy: ImagePolicy, *, by_reference: bool = False
    ) -> None:
        self._function, self._policy, self._by_reference = function, policy, by_reference

    def decode_batch(self, files: Sequence[bytes]) -> DecodedBatch:
        """Decode one file after the other."""
        pixels = mean_colour_images(len(files), self._policy)
        failures = {}
        for position, data in enumerate(files):
            try:
                pixels[position] = torch.from_numpy(np.array(self._function(data, self._policy)))
            except DataError as error:
                failures[position] = str(error)
        left = tuple(n for n in range(len(files)) if n not in failures) if self._by_reference else ()
        return DecodedBatch(pixels, failures, left)


def backend_version(backend: Backend) -> str:
    """Name and version of the decoding library. Raises ImportError when it is not installed."""
    if backend == "dali":
        from megatron_share4v.data.images.dali_decoder import VERSION

        return VERSION
    return pil_decoder.VERSION if backend == "pil" else f"{pil_decoder.VERSION}, torch {torch.__version__}"


def open_decoder(backend: Backend, policy: ImagePolicy, *, device_index: int | None = None) -> Decoder:
    """Open the decoder of a backend; device_index: the GPU that `dali` decodes on, None for the CPU.

    A policy whose filter the backend lacks is left to Pillow. Raises OpsError when the backend is not installed.
    """
    if backend == "pil":
        return PerImageDecoder(pil_decoder.decode, policy)
    if backend == "torch_u8":
        if policy.resample not in torch_decoder.FILTERS:
            return PerImageDecoder(pil_decoder.decode, policy, by_reference=True)
        return PerImageDecoder(torch_decoder.decode, policy)
    try:
        from megatron_share4v.data.images.dali_decoder import DaliDecoder
    except ImportError as error:
        raise OpsError(
            f"data.image_backend dali: NVIDIA DALI cannot be imported ({error}); install it with pip install -e "
            f'".[dali]", '
            "or use data.image_backend pil or torch_u8"
        ) from error
    return DaliDecoder(policy, device_index=device_index)
