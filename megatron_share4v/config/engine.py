"""How the generation engine divides its memory and its steps. Sizes are of one model replica, never per tensor rank."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_share4v.config.base import Bool, Conflict, NonNegativeInt, PositiveInt, config


@config
class EngineConfig:
    """Limits of the engine."""

    max_requests: PositiveInt = 16
    """Requests that are answered at the same time; the others wait."""
    max_positions: PositiveInt | None = None
    """Positions of prompt and answer together, at most. None: what the model has."""
    cache_positions: PositiveInt | None = None
    """Positions whose keys and values are kept, of running requests and of prefixes to use again. None: as many as max_requests of full length take,
    or as fit into half of the memory that is free, if that is less."""
    step_positions: PositiveInt = 256
    """Positions computed in one step; a longer prompt takes several, between which the other requests go on."""
    prefix_cache: Bool = True
    """Use keys and values of an earlier request again where a prompt begins like it, images included."""
    image_cache_bytes: NonNegativeInt = 256 << 20
    """Of image features kept for prompts to come, the least recently used of which go first; those in use are kept whatever this says."""

    def conflicts(self) -> Iterator[Conflict]:
        """A step that cannot give each running request its token."""
        if self.max_requests > self.step_positions:
            message = f"step_positions {self.step_positions} is less than max_requests {self.max_requests}, of which each takes one in every step"
            yield Conflict(message, ("step_positions", "max_requests"))
