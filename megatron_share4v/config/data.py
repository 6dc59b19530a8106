"""The data section of a run: prepared data sets, text and image processing, sample order, and loader processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_share4v.config.base import Conflict, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, config


@config
class BlendSource:
    """One data set of a blend."""

    path: str
    """Directory with shards, index.npy and dataset.json."""
    weight: PositiveFloat | None = None
    """Fraction of the samples, relative to the other weights. All sources have a weight, or none has."""
    epochs: PositiveFloat | None = None
    """Passes over this data set per epoch of the blend (default 1 without weights); with 0.5 each epoch visits half of
    the samples, the next one the other half."""


@config
class DataConfig:
    """Prepared data (directories written by tools/prepare_data.py) and how it is read."""

    train: str | tuple[BlendSource, ...]
    """Directory with shards, index.npy and dataset.json; or a list of them, each with its weight or epochs:
    `[{path: ..., epochs: 2}, ...]`."""
    validation: str | None = None
    """Directory of the validation set; null: no validation."""
    tokenizer: str
    """A sentencepiece `tokenizer.model`, or a `tokenizer.json`; must be the one that the data set was prepared with."""
    template: str = "vicuna_v1"
    """Conversation template; must be the one that the data set was prepared with."""
    trained_markers: Literal["answer_only", "official"] = "answer_only"
    """`answer_only`: answers and their end tokens are trained, as each template says. `official`: for qwen_2 (qwen_1_5)
    and llava_llama_3, also the markers that LLaVA-NeXT's code trains (docs/templates.md). Must be what the data set was
    prepared with."""
    max_text_length: PositiveInt = 2048
    """Text positions kept per sample, an image counted as one (ShareGPT4V's model_max_length)."""
    image_aspect_ratio: Literal["square", "pad"] = "pad"
    """`pad`: pad to a square with the tower's mean colour first. `square`: do not; what the resize cuts or distorts
    then follows from `model.vision.resize`."""
    image_orientation: Literal["stored", "exif"] = "stored"
    """`stored`: pixels as they are in the file, as the official code trains. `exif`: turned upright by the EXIF tag of
    cameras. Applied in training, and by everything that later runs the checkpoint."""
    order: Literal["sequential", "random", "block", "group_by_modality_length"] = "random"
    """`random`: a permutation per epoch. `block`: nearly random with mostly sequential reads, for network storage."""
    group_size: PositiveInt | None = None
    """Samples per group of group_by_modality_length; null: the global batch size."""
    block_size: PositiveInt = 64
    """Consecutive samples (or packs) per block of the order `block`."""
    block_window: PositiveInt = 32
    """Blocks among which the order `block` shuffles samples."""
    pack_length: PositiveInt | None = None
    """Pack as many samples as fit into each sequence of this many positions; lengths and batch sizes then count packs.
    null: no packing."""
    pack_window: PositiveInt = 2048
    """Window of samples within which packs are built."""
    num_workers: NonNegativeInt = 2
    """Loader processes on each rank that reads data; 0: read in the training process."""
    prefetch: PositiveInt = 2
    """Micro-batches that each worker prefetches."""
    worker_timeout_s: PositiveInt = 120
    """A loader process that returns nothing for this long is logged, killed and restarted at the same position; after a
    second time its micro-batch is left out. Other ranks wait meanwhile, so parallel.timeout_s must be longer."""
    image_backend: Literal["pil", "torch_u8", "dali"] = "pil"
    """`pil`: the reference, bitwise equal to Hugging Face's image processors. `torch_u8`: differs by at most 2 of 255,
    faster; leaves the filter lanczos to pil. `dali`: NVIDIA DALI, on the GPU when there is one (extra [dali]). All but
    pil are compared with it on some images at start."""
    max_faulty_fraction: Fraction = 0.001
    """Samples that cannot be read are replaced by samples without labels and listed in quarantine.jsonl; more than this
    fraction of the consumed samples (and more than 8) ends the run. 0: the first one ends it."""
    pad_multiple: PositiveInt = 8
    """Sequences are padded to the longest of `pad_to`, rounded up to this multiple."""
    pad_to: Literal["step", "micro_batch"] = "step"
    """`step`: one length for all micro-batches of a global batch. `micro_batch`: a length for each, with less padding;
    pipeline stages then exchange the length before each send."""

    def conflicts(self) -> Iterator[Conflict]:
        """Find orders, weights and epochs that exclude each other."""
        if self.pack_length and self.order == "group_by_modality_length":
            reason = "order group_by_modality_length makes batches of samples of one length"
            message = f"{reason}; pack_length {self.pack_length} needs another order"
            yield Conflict(message, ("order", "pack_length"))
        if not isinstance(self.train, str):
            if not self.train:
                yield Conflict("train is an empty list; name a prepared data set", ("train",))
            weighted = sum(source.weight is not None for source in self.train)
            if weighted and (weighted < len(self.train) or any(source.epochs is not None for source in self.train)):
                yield Conflict("train mixes weights and epochs; give every data set a weight, or none", ("train",))
