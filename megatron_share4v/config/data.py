"""Where samples come from, how their text and images are read, and in what order they are trained."""

from __future__ import annotations

from typing import Literal

from megatron_share4v.config.base import NonNegativeInt, PositiveInt, config


@config
class DataConfig:
    """One prepared data set (a directory written by tools/prepare_data.py) and how it is read."""

    train: str
    """Directory with shards, index.npy and dataset.json."""
    validation: str | None = None
    """A second such directory for the validation loss; none: no validation."""
    tokenizer: str
    """A sentencepiece `tokenizer.model`; must be the one that the data set was prepared with."""
    template: str = "vicuna_v1"
    """Conversation template; must be the one that the data set was prepared with."""
    max_text_length: PositiveInt = 2048
    """Text positions kept per sample, an image counted as one (ShareGPT4V's model_max_length)."""
    image_aspect_ratio: Literal["square", "pad"] = "pad"
    """`square`: resize the short side and crop the centre. `pad`: pad to a square with the mean colour first."""
    order: Literal["sequential", "random", "group_by_modality_length"] = "random"
    group_size: PositiveInt | None = None
    """Samples per group of group_by_modality_length; none: the global batch size."""
    num_workers: NonNegativeInt = 2
    """Loader processes on each rank that reads; 0: read in the training process."""
    prefetch: PositiveInt = 2
    """Micro-batches that each worker keeps ready."""
    pad_multiple: PositiveInt = 8
    """Sequences of a step are padded to the longest of the global batch, rounded up to this multiple."""
