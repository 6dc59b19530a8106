"""State of one request in the engine: tokens, computed positions, KV rows, and stop conditions."""

from __future__ import annotations

import secrets
from typing import Literal

import numpy as np
import torch

from megatron_share4v.infer.kv_allocator import KVRange
from megatron_share4v.infer.prefix_hash import BLOCK_SIZE, block_keys, image_digest, prompt_content, text_content
from megatron_share4v.infer.request import GenerationRequest, TokenLogprobs
from megatron_share4v.infer.sampler import SamplingRow
from megatron_share4v.infer.step_plan import ImageSpan


class Sequence:
    """Tokens of a request, prompt and generated; the first `num_computed` have keys and values in `kv_range`.

    looked_up_images: digests already counted as image cache queries.
    """

    def __init__(self, request: GenerationRequest, *, end_ids: frozenset[int]) -> None:
        prompt, sampling = request.prompt, request.sampling
        self.request, self.sampling = request, sampling
        self.tokens: list[int] = prompt.token_ids.tolist()
        self.prompt_length = len(self.tokens)
        self.num_computed = 0
        self._kv_range: KVRange | None = None
        self.digests = [image_digest(image) for image in prompt.pixels]
        self.looked_up_images: set[bytes] = set()
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        slots = set(prompt.image_slots.tolist())
        self._content = prompt_content(prompt, self.digests)
        self.prompt_keys = tuple(block_keys(self._content))
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._prompt_ids = frozenset(token for position, token in enumerate(self.tokens) if position not in slots)
        self._stop_ids = sampling.stop_ids if sampling.ignore_eos else sampling.stop_ids | end_ids

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def kv_range(self) -> KVRange:
        """KV cache rows, assigned on admission."""
        assert self._kv_range is not None, f"request {self.id!r} is not running"
        return self._kv_range

    @kv_range.setter
    def kv_range(self, kv_range: KVRange) -> None:
        self._kv_range = kv_range

    @property
    def generated(self) -> list[int]:
        """Generated ids, without the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def positions(self) -> int:
        """Rows needed by the prompt and the longest answer; the last token is never fed back."""
        return self.prompt_length + max(0, self.sampling.max_new_tokens - 1)

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt has not been computed."""
        return self.num_computed < self.prompt_length

    def sampling_row(self) -> SamplingRow:
        """The sampler's input for the next token."""
        generated = self.generated
        forbidden = self._stop_ids if len(generated) < self.sampling.min_tokens else frozenset()
        return SamplingRow(
            sampling=self.sampling,
            seed=self._seed,
            prompt_ids=self._prompt_ids,
            generated=generated,
            forbidden=forbidden,
        )

    def append_token(self, token: int) -> Literal[None, "stop", "length"]:
        """Append `token`, or return "stop" when it ends the answer; "length" when it was the last allowed one."""
        if token in self._stop_ids:
            return "stop"
        self.tokens.append(token)
        return "length" if len(self.tokens) - self.prompt_length >= self.sampling.max_new_tokens else None

    def new_block_keys(self) -> list[bytes]:
        """Keys of the blocks filled since the last call."""
        if self.num_computed // BLOCK_SIZE == len(self.kv_range.keys):
            return []
        known = len(self._content)
        if self.num_computed > known:
            self._content = np.concatenate([self._content, text_content(self.tokens[known : self.num_computed])])
        return block_keys(self._content[: self.num_computed], before=self.kv_range.keys)

    def image_spans(self, first: int, last: int, *, at: int) -> list[ImageSpan]:
        """Image slots among positions first .. last - 1, which the step computes from index `at`."""
        slots = self.request.prompt.image_slots
        if not self.digests or first >= self.prompt_length:
            return []
        size = slots.numel() // len(self.digests)
        found = []
        for digest, own in zip(self.digests, slots.split(size)):
            rows = ((own >= first) & (own < last)).nonzero().flatten()
            if rows.numel():
                found.append(ImageSpan(digest=digest, slots=own[rows] - first + at, rows=rows))
        return found

    def pending_digests(self) -> set[bytes]:
        """Digests of images with slots that have not been computed."""
        slots = self.request.prompt.image_slots
        if not self.digests or not self.in_prefill:
            return set()
        size = slots.numel() // len(self.digests)
        return {
            digest for digest, own in zip(self.digests, slots.split(size)) if bool((own >= self.num_computed).any())
        }

    def pixels_of(self, digest: bytes) -> torch.Tensor:
        """Pixels [H, W, 3] uint8 of an image."""
        return self.request.prompt.pixels[self.digests.index(digest)]
