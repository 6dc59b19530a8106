"""Limits of the generation engine. Sizes are per model replica, not per TP rank."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_share4v.config.base import Bool, Conflict, NonNegativeInt, PositiveInt, config


@config
class EngineConfig:
    """Limits of the engine's batch, KV cache and steps."""

    max_requests: PositiveInt = 16
    """Requests that run at the same time; the others wait."""
    max_positions: PositiveInt | None = None
    """Longest prompt plus answer, in positions. null: what the model supports."""
    cache_positions: PositiveInt | None = None
    """Size of the KV cache in positions, for running requests and reusable prefixes. null: max_requests of full length,
    or what fits into half of the free memory if that is less."""
    step_positions: PositiveInt = 256
    """Positions computed in one step; a longer prompt is prefilled in chunks, interleaved with other requests."""
    prefix_cache: Bool = True
    """Reuse the KV cache of an earlier request with the same prefix, images included."""
    image_cache_bytes: NonNegativeInt = 256 << 20
    """Size of the LRU cache of image features; features in use do not count."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find a step too small for one token of each running request."""
        if self.max_requests > self.step_positions:
            need = f"max_requests {self.max_requests}, of which each takes one in every step"
            message = f"step_positions {self.step_positions} is less than {need}"
            yield Conflict(message, ("step_positions", "max_requests"))
