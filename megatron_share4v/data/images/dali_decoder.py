"""Encoded image files to uint8 pixels with NVIDIA DALI: one graph for the CPU and the GPU, fed with files that the index found.

DALI fails a batch as a whole and would allocate whatever a header claims, so headers are checked first, formats that it
does not read go to Pillow, and a batch that fails is decoded image by image. N images, S the tower's input side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from megatron_share4v.data.images import pil_decoder
from megatron_share4v.data.images.policy import PAD_COLOUR, DecodedBatch, ImagePolicy, mean_colour_images
from megatron_share4v.errors import DataError, OpsError
from megatron_share4v.logging import get_logger

VERSION = f"DALI {nvidia.dali.__version__}"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000")
LEAST_BATCH = 8  # room that the graph is built with; more is made when a batch needs it
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK")


def make_graph(
    policy: ImagePolicy,
    *,
    decoding: Literal["cpu", "mixed"],
    device_index: int | None,
    batch_size: int,
    threads: int = 1,
) -> Pipeline:
    """Inputs: `files`, encoded images; `canvas` and `resized`, [2] float (height, width) of each, from the policy. Output: [S, S, 3] uint8.

    decoding: `mixed` decodes on the GPU, and all that follows happens there. That graph can be made and serialised
    without a GPU (device_index None), but neither built nor run.
    """

    @pipeline_def(
        batch_size=batch_size, num_threads=threads, device_id=device_index, exec_dynamic=True, prefetch_queue_depth=1
    )
    def graph() -> object:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        canvas = fn.external_source(name="canvas", dtype=types.FLOAT, ndim=1)
        resized = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)
        # The reference ignores EXIF orientation; fancy upsampling is what libjpeg does, and the GPU decoder by itself does not.
        images = fn.decoders.image(
            files, device=decoding, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
        )
        padded = fn.crop(
            images, crop_h=canvas[0], crop_w=canvas[1], crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate",
            out_of_bounds_policy="pad", fill_values=[float(value) for value in PAD_COLOUR],
        )  # fmt: skip
        # uint8: a float result would not be rounded and not be clipped where bicubic overshoots.
        scaled = fn.resize(
            padded,
            resize_y=resized[0],
            resize_x=resized[1],
            mode="stretch",
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=types.UINT8,
        )
        size = policy.image_size
        return fn.crop(scaled, crop_h=size, crop_w=size, crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate")

    return graph()


class DaliDecoder:
    """Decodes batches; the graph is built at the first one, in the process that uses it."""

    def __init__(self, policy: ImagePolicy, *, device_index: int | None) -> None:
        """Raises OpsError when DALI cannot use the GPU that it is told to use."""
        self._policy, self._device_index = policy, device_index
        self._graph: Pipeline | None = None
        if device_index is not None and not torch.cuda.is_available():
            raise OpsError(
                f"data.image_backend dali: GPU {device_index} cannot be used; let it decode on the CPU, or check the "
                f"driver"
            )

    def decode_batch(self, files: Sequence[bytes]) -> DecodedBatch:
        """See Decoder. Pixels lie on the GPU when this decodes there."""
        pixels = mean_colour_images(len(files), self._policy)
        if self._device_index is not None:
            pixels = pixels.to(torch.device("cuda", self._device_index))
        shapes, failures = self._examine(files)
        readable = [position for position, shape in shapes.items() if shape is not None]
        decoded = self._decode(files, shapes, readable)
        for position, image in decoded.items():
            pixels[position] = image
        left = tuple(position for position in shapes if position not in decoded)
        for position in left:
            try:
                pixels[position] = torch.from_numpy(np.array(pil_decoder.decode(files[position], self._policy)))
            except DataError as error:
                failures[position] = str(error)
        return DecodedBatch(pixels, failures, left)

    def _examine(self, files: Sequence[bytes]) -> tuple[dict[int, tuple[int, int] | None], dict[int, str]]:
        """(width, height) of each image by position, None where DALI would not read it right; and what cannot be read by anyone."""
        shapes: dict[int, tuple[int, int] | None] = {}
        failures: dict[int, str] = {}
        for position, data in enumerate(files):
            try:
                header = pil_decoder.open_header(data)
            except DataError as error:
                failures[position] = str(error)
                continue
            shapes[position] = header.size if header.format in FORMATS and header.mode in MODES else None
        return shapes, failures

    def _decode(
        self, files: Sequence[bytes], shapes: dict[int, tuple[int, int] | None], positions: list[int]
    ) -> dict[int, torch.Tensor]:
        """[S, S, 3] by position; without those that DALI cannot decode."""
        if not positions:
            return {}
        try:
            images = self._run(
                [files[position] for position in positions], [shapes[position] for position in positions]
            )
            return dict(zip(positions, images))
        except RuntimeError as error:
            # Any bad image fails the batch. Alone, so that an image's pixels never depend on its neighbours.
            get_logger().debug("DALI refused a batch of %d: %s", len(positions), error)
            if len(positions) == 1:
                return {}
        decoded: dict[int, torch.Tensor] = {}
        for position in positions:
            decoded |= self._decode(files, shapes, [position])
        return decoded

    def _run(self, files: list[bytes], shapes: list[tuple[int, int]]) -> torch.Tensor:
        if self._graph is None or self._graph.max_batch_size < len(files):
            decoding = "cpu" if self._device_index is None else "mixed"
            size = max(len(files), LEAST_BATCH)
            self._graph = make_graph(self._policy, decoding=decoding, device_index=self._device_index, batch_size=size)
            self._graph.build()
        canvases = [self._policy.canvas(*shape) for shape in shapes]
        (output,) = self._graph.run(
            files=[np.frombuffer(data, dtype=np.uint8) for data in files],
            canvas=[np.array(canvas[::-1], dtype=np.float32) for canvas in canvases],
            resized=[np.array(self._policy.resized(*canvas)[::-1], dtype=np.float32) for canvas in canvases],
        )
        # Cloned: the memory is DALI's and is used again at the next run.
        return torch.from_dlpack(output.as_tensor()).clone()
