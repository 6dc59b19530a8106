"""Records of the captioner: ImageEntry in, CaptionRow out, CaptionSettings for both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.errors import DataError

INSTRUCTION = "Analyze the image in a comprehensive and detailed manner."
"""Prompt of ShareCaptioner (arXiv 2311.12793, published tool)."""


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One input image.

    path: as listed, and as in the results. Its bytes are `file`, or `size` bytes of it from `offset`.
    """

    id: str
    path: str
    file: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Read the encoded image. Raises DataError when it is unreadable, truncated or empty."""
        try:
            with Path(self.file).open("rb") as file:
                file.seek(self.offset)
                data = file.read() if self.size is None else file.read(self.size)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"image cannot be read ({reason})") from error
        if not data or self.size not in (None, len(data)):
            raise DataError(f"image has {len(data)} bytes" + (f" of {self.size}" if self.size else ""))
        return data


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """Result of one image: a caption of `tokens` tokens, or an error. finish_reason: "stop" or "length"."""

    id: str
    path: str
    caption: str | None = None
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Generation settings of a caption. temperature 0: greedy. num_beams: see infer/beam_search.py."""

    prompt: str = INSTRUCTION
    max_new_tokens: int = 500
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_beams: int = 1

    def seed_of(self, picture: ImageEntry) -> int:
        """Seed of one image, so that a sampled caption depends neither on the others nor on a restart."""
        return (
            int.from_bytes(
                hashlib.sha256(f"{self.seed}:{picture.id}".encode("utf-8", "surrogateescape")).digest()[:4], "little"
            )
            >> 1
        )
