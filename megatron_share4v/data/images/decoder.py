"""The image decoders behind one interface: many encoded files in, uint8 pixels out, with the failures named instead of raised.

`pil` is the reference; parity.py measures the others against it. How each decodes is in pil_decoder.py, torch_decoder.py, dali_decoder.py.
N images, S the tower's input side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch

from megatron_share4v.data.images import pil_decoder, torch_decoder
from megatron_share4v.data.images.policy import DecodedBatch, ImagePolicy, mean_colour_images
from megatron_share4v.errors import DataError, OpsError

Backend = Literal["pil", "torch_u8", "dali"]


class Decoder(Protocol):
    """Decodes the images of one micro-batch; what an image becomes does not depend on the others."""

    def decode_batch(self, files: Sequence[bytes]) -> DecodedBatch:
        """N encoded files -> pixels and failures."""


class PerImageDecoder:
    """A decoder made of a function for one image, which raises DataError."""

    def __init__(self, function: Callable[[bytes, ImagePolicy], np.ndarray], policy: ImagePolicy) -> None:
        self._function, self._policy = function, policy

    def decode_batch(self, files: Sequence[bytes]) -> DecodedBatch:
        """One after the other."""
        pixels = mean_colour_images(len(files), self._policy)
        failures = {}
        for position, data in enumerate(files):
            try:
                pixels[position] = torch.from_numpy(np.array(self._function(data, self._policy)))
            except DataError as error:
                failures[position] = str(error)
        return DecodedBatch(pixels, failures)


def backend_version(backend: Backend) -> str:
    """Name and version of what decodes. Raises ImportError when it is not installed."""
    if backend == "dali":
        from megatron_share4v.data.images.dali_decoder import VERSION

        return VERSION
    return pil_decoder.VERSION if backend == "pil" else f"{pil_decoder.VERSION}, torch {torch.__version__}"


def open_decoder(backend: Backend, policy: ImagePolicy, *, device_index: int | None = None) -> Decoder:
    """device_index: the GPU that `dali` decodes on; None: the CPU. Raises OpsError when the backend is not installed."""
    if backend == "pil":
        return PerImageDecoder(pil_decoder.decode, policy)
    if backend == "torch_u8":
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
