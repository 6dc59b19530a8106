"""Hash keys of sequence prefixes: equal if and only if all ids, images and positions from the start are equal.

A sequence is cut into blocks of BLOCK_SIZE positions. A block's key is a hash of its content and of the previous key.
The content of an image slot is the hash of the image's pixels, because slots of all images have the same token id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from megatron_share4v.data.loading.prompt import Prompt

BLOCK_SIZE = 16
_WORDS = 4  # 64-bit words in a hash


def image_digest(pixels: torch.Tensor) -> bytes:
    """SHA-256 of one image, [H, W, 3] uint8, as fed to the vision tower."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest()


def prompt_content(prompt: Prompt, digests: Sequence[bytes]) -> np.ndarray:
    """Content [L, 4] int64 of each prompt position; `digests` are those of its images."""
    content = text_content(prompt.token_ids.tolist())
    if digests:
        images = np.frombuffer(b"".join(digests), dtype=np.int64).reshape(len(digests), _WORDS)
        content[prompt.image_slots.numpy()] = images.repeat(prompt.image_slots.numel() // len(digests), axis=0)
    return content


def text_content(ids: Sequence[int]) -> np.ndarray:
    """Content [L, 4] int64 of text tokens."""
    content = np.full((len(ids), _WORDS), -1, dtype=np.int64)
    content[:, 0] = ids
    return content


def block_keys(content: np.ndarray, *, before: Sequence[bytes] = ()) -> list[bytes]:
    """Keys of the full blocks of content [L, 4] that follow those in `before`."""
    keys = list(before[-1:])
    first = len(before)
    for number in range(first, len(content) // BLOCK_SIZE):
        block = content[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + block.tobytes()).digest())
    return keys[len(before[-1:]) :]
