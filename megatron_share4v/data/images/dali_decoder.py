"""NVIDIA DALI decoder, on the CPU or the GPU: encoded image files to uint8 pixels.

One bad image fails a whole DALI batch, and DALI allocates the size given in a header. Therefore headers are checked
first, formats that DALI does not read are decoded with Pillow, and a failed batch is decoded image by image.
N images, S the vision tower's input side.
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
from megatron_share4v.data.images.pil_decoder import read_orientation
from megatron_share4v.data.images.pixels import DecodedBatch, mean_colour_images
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.errors import DataError, OpsError
from megatron_share4v.logging import get_logger

VERSION = f"DALI {nvidia.dali.__version__}"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000")
MIN_BATCH_SIZE = 8  # smallest batch size of the graph; a larger batch rebuilds it
FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR, "lanczos": types.INTERP_LANCZOS3}
"""DALI's filters by ImagePolicy.resample."""
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK")


def make_graph(
    policy: ImagePolicy,
    *,
    decoding: Literal["cpu", "mixed"],
    device_index: int | None,
    batch_size: int,
    threads: int = 1,
) -> Pipeline:
    """Define the graph that decodes, pads, resizes and crops a batch of images.

    Inputs: `files`, encoded images; `canvas` and `resized`, [2] float (height, width) of each image, from the policy.
    Output: [S, S, 3] uint8.
    decoding: `mixed` decodes and processes on the GPU. Such a graph can be defined and serialised without a GPU
    (device_index None), but not built or run.
    """

    @pipeline_def(
        batch_size=batch_size, num_threads=threads, device_id=device_index, exec_dynamic=True, prefetch_queue_depth=1
    )
    def graph() -> object:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        canvas = fn.external_source(name="canvas", dtype=types.FLOAT, ndim=1)
        resized = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)
        # The reference ignores EXIF orientation. libjpeg uses fancy upsampling; the GPU decoder does not by default.
        images = fn.decoders.image(
            files, device=decoding, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
        )
        padded = fn.crop(
            images, crop_h=canvas[0], crop_w=canvas[1], crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate",
            out_of_bounds_policy="pad", fill_values=[float(value) for value in policy.pad_colour],
        )  # fmt: skip
        # uint8: a float result would be neither rounded nor clipped where interpolation overshoots.
        scaled = fn.resize(
            padded,
            resize_y=resized[0],
            resize_x=resized[1],
            mode="stretch",
            interp_type=FILTERS[policy.resample],
            antialias=True,
            dtype=types.UINT8,
        )
        size = policy.image_size
        return fn.crop(scaled, crop_h=size, crop_w=size, crop_pos_x=0.5, crop_pos_y=0.5, rounding="truncate")

    return graph()


class DaliDecoder:
    """DALI implementation of Decoder; the graph is built at the first batch, in the process that decodes."""

    def __init__(self, policy: ImagePolicy, *, device_index: int | None) -> None:
        """Set the GPU that decodes, or None for the CPU. Raises OpsError when the GPU cannot be used."""
        self._policy, self._device_index = policy, device_index
        self._graph: Pipeline | None = None
        if device_index is not None and not torch.cuda.is_available():
            raise OpsError(
                f"data.image_backend dali: GPU {device_index} cannot be used; decode on the CPU, or check the driver"
            )

    def decode_batch(self, files: Sequence[bytes]) -> DecodedBatch:
        """Decode N encoded files; the pixels are on the GPU if DALI decodes there."""
        pixels = mean_colour_images(len(files), self._policy)
        if self._device_index is not None:
            pixels = pixels.to(torch.device("cuda", self._device_index))
        shapes, failures = self._read_headers(files)
        decoded = self._decode(files, shapes, list(shapes))
        for position, image in decoded.items():
            pixels[position] = image
        by_pillow = tuple(n for n in range(len(files)) if n not in decoded and n not in failures)
        for position in by_pillow:
            try:
                pixels[position] = torch.from_numpy(np.array(pil_decoder.decode(files[position], self._policy)))
            except DataError as error:
                failures[position] = str(error)
        return DecodedBatch(pixels, failures, by_pillow)

    def _read_headers(self, files: Sequence[bytes]) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
        """Return (width, height) by position of the images that DALI reads correctly, and the unreadable images."""
        shapes: dict[int, tuple[int, int]] = {}
        failures: dict[int, str] = {}
        for position, data in enumerate(files):
            try:
                header = pil_decoder.open_header(data)
            except DataError as error:
                failures[position] = str(error)
                continue
            # DALI never turns an image; Pillow turns a TIFF always, other formats if the policy says so.
            can_turn = self._policy.orientation == "exif" or header.format == "TIFF"
            if (can_turn and read_orientation(header) != 1) or self._policy.is_canvas_huge(*header.size):
                continue
            if header.format in FORMATS and header.mode in MODES:
                shapes[position] = header.size
        return shapes, failures

    def _decode(
        self, files: Sequence[bytes], shapes: dict[int, tuple[int, int]], positions: list[int]
    ) -> dict[int, torch.Tensor]:
        """Decode the images at `positions` to [S, S, 3] each; images that DALI cannot decode are left out."""
        if not positions:
            return {}
        try:
            images = self._run(
                [files[position] for position in positions], [shapes[position] for position in positions]
            )
            return dict(zip(positions, images))
        except RuntimeError as error:
            # One bad image fails the batch. Decode one by one, so that the pixels of an image never depend on others.
            get_logger().debug("DALI could not decode a batch of %d: %s", len(positions), error)
            if len(positions) == 1:
                return {}
        decoded: dict[int, torch.Tensor] = {}
        for position in positions:
            decoded |= self._decode(files, shapes, [position])
        return decoded

    def _run(self, files: list[bytes], shapes: list[tuple[int, int]]) -> torch.Tensor:
        if self._graph is None or self._graph.max_batch_size < len(files):
            decoding: Literal["cpu", "mixed"] = "cpu" if self._device_index is None else "mixed"
            size = max(len(files), MIN_BATCH_SIZE)
            self._graph = make_graph(self._policy, decoding=decoding, device_index=self._device_index, batch_size=size)
            self._graph.build()
        canvases = [self._policy.canvas(*shape) for shape in shapes]
        (output,) = self._graph.run(
            files=[np.frombuffer(data, dtype=np.uint8) for data in files],
            canvas=[np.array(canvas[::-1], dtype=np.float32) for canvas in canvases],
            resized=[np.array(self._policy.resized(*canvas)[::-1], dtype=np.float32) for canvas in canvases],
        )
        # DALI reuses its output memory at the next run.
        return torch.from_dlpack(output.as_tensor()).clone()
