"""Where samples come from, how their text and images are read, and in what order they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_share4v.config.base import Conflict, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, config


@config
class BlendSource:
    """One of several data sets that are trained on together."""

    path: str
    """Directory with shards, index.npy and dataset.json."""
    weight: PositiveFloat | None = None
    """Share of the samples, relative to the other weights. All sources have a weight, or none has."""
    epochs: PositiveFloat | None = None
    """How often an epoch of the blend goes through this data set (1 if there is no weight); 0.5 visits every other sample, others next time."""


@config
class DataConfig:
    """The prepared data (directories written by tools/prepare_data.py) and how it is read."""

    train: str | tuple[BlendSource, ...]
    """Directory with shards, index.npy and dataset.json; or a list of them, each with its share: `[{path: ..., epochs: 2}, ...]`."""
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
    order: Literal["sequential", "random", "block", "group_by_modality_length"] = "random"
    """`random`: a permutation per epoch. `block`: nearly that, but reading consecutive samples, for network storage."""
    group_size: PositiveInt | None = None
    """Samples per group of group_by_modality_length; none: the global batch size."""
    block_size: PositiveInt = 64
    """Consecutive samples (or packs) that the order `block` keeps near each other."""
    block_window: PositiveInt = 32
    """Blocks among which the order `block` shuffles samples."""
    pack_length: PositiveInt | None = None
    """Put as many samples as fit into each sequence of this many positions; every length and batch size then counts packs. None: no packing."""
    pack_window: PositiveInt = 2048
    """Samples among which packs are put together."""
    num_workers: NonNegativeInt = 2
    """Loader processes on each rank that reads; 0: read in the training process."""
    prefetch: PositiveInt = 2
    """Micro-batches that each worker keeps ready."""
    worker_timeout_s: PositiveInt = 120
    """A loader process that gives nothing for so long is named, ended and started again at the same place; after a second time its micro-batch is
    left out. Meanwhile the other ranks wait, so parallel.timeout_s must be longer than that."""
    image_backend: Literal["pil", "torch_u8", "dali"] = "pil"
    """`pil`: the reference, bit-equal to CLIP's image processor. `torch_u8`: 2 of 255 away at most, faster. `dali`: NVIDIA DALI, on the GPU
    where there is one (extra [dali]). Any but pil is measured against it on some images at start."""
    max_faulty_fraction: Fraction = 0.001
    """Samples that cannot be read while training are replaced, without labels, and listed in quarantine.jsonl; more than this share of those
    consumed so far (and more than 8) end the run. 0: the first one ends it."""
    pad_multiple: PositiveInt = 8
    """Sequences are padded to the longest of `pad_to`, rounded up to this multiple."""
    pad_to: Literal["step", "micro_batch"] = "step"
    """`step`: one length for all micro-batches of a global batch. `micro_batch`: each has its own, and nothing longer is computed; pipeline stages then
    tell each other the length before they send."""

    def conflicts(self) -> Iterator[Conflict]:
        """Orders and shares that exclude each other."""
        if self.pack_length and self.order == "group_by_modality_length":
            message = f"order group_by_modality_length makes batches of samples of one length; pack_length {self.pack_length} needs another order"
            yield Conflict(message, ("order", "pack_length"))
        if not isinstance(self.train, str):
            if not self.train:
                yield Conflict("train is an empty list; name a prepared data set", ("train",))
            weighted = sum(source.weight is not None for source in self.train)
            if weighted and (weighted < len(self.train) or any(source.epochs is not None for source in self.train)):
                yield Conflict("train mixes weights and epochs; give every data set a weight, or none", ("train",))
