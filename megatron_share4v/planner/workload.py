"""Workload: average amounts per training sequence, from a prepared data set or from stated assumptions.

A sequence is one sample, padded to the longest of the global batch, or a pack of samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_share4v.config.run import RunConfig
from megatron_share4v.model.flops import WorkloadCounts

# (text positions per sample, longest of a step, longest of all, share of the text that is trained) where no data set is
# at hand: captions of
# ShareGPT4V-PT without a prompt, and instructions of its mix, whose tail makes the padding (docs/measurements/data.md:
# half of all positions).
CAPTIONS, INSTRUCTIONS = (200, 400, 600, 1.0), (294, 1280, 2048, 0.55)
UNGROUPED, GROUPED = (
    0.6,
    0.1,
)  # share of a step's padding that is left where each micro-batch is padded to its own longest
SPREAD = 1.1  # mean square of the lengths over the square of their mean


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Means per sequence."""

    length: int
    """Positions per sequence, padding included (S)."""
    longest: int
    """Positions per sequence in the longest step of the run, which determines peak memory."""
    positions: float
    """Positions per sequence without padding."""
    squares: float
    """Sum of the squared sample lengths in a sequence."""
    padded_squares: float
    """Sum of the squared lengths as attention computes them, padding included."""
    images: float
    head_rows: float
    """Positions that carry a label."""
    sequences: int | None
    """Sequences in one epoch; None when unknown, and then hours are not predicted."""
    source: str
    """Origin of the numbers, as printed."""

    def real(self, sequences: float) -> WorkloadCounts:
        """Amounts in `sequences` sequences without padding."""
        return WorkloadCounts(
            positions=self.positions * sequences,
            squares=self.squares * sequences,
            images=self.images * sequences,
            head_rows=self.head_rows * sequences,
        )

    def done(self, sequences: float) -> WorkloadCounts:
        """Amounts in `sequences` sequences as computed, padding included."""
        return WorkloadCounts(
            positions=self.length * sequences,
            squares=self.padded_squares * sequences,
            images=self.images * sequences,
            head_rows=self.head_rows * sequences,
        )


def has_prepared_data(config: RunConfig) -> bool:
    """True when every training data set of `config` is prepared on this machine."""
    train = config.data.train
    paths = [train] if isinstance(train, str) else [source.path for source in train]
    return all((Path(path) / "dataset.json").exists() for path in paths)


def assumed_workload(
    config: RunConfig, *, samples: int | None = None, text_length: int | None = None, longest: int | None = None
) -> Workload:
    """Assume one image per sample, and text lengths of CAPTIONS or INSTRUCTIONS depending on the template.

    text_length, longest: text positions of a sample (without its image), on average and of the longest sample of a
    step.
    """
    usual, usual_longest, usual_most, trained = CAPTIONS if config.data.template == "plain" else INSTRUCTIONS
    text = usual if text_length is None else text_length
    patches, data = config.model.vision.num_features, config.data
    of_step = max(text, min(longest or round(usual_longest * text / usual), data.max_text_length))
    of_run = max(of_step, min(usual_most, data.max_text_length))
    position = patches + text
    squares = SPREAD * position**2
    source = f"assumed: {text} text positions per sample, {trained:.0%} trained, one image"
    if data.pack_length:
        per_pack = max(1.0, 0.99 * data.pack_length / position)
        rest = data.pack_length - per_pack * position
        return Workload(
            length=data.pack_length,
            positions=per_pack * position,
            squares=per_pack * squares,
            longest=data.pack_length,
            padded_squares=per_pack * squares + max(rest, 0.0) ** 2,
            images=per_pack,
            head_rows=per_pack * trained * text,
            sequences=None if samples is None else round(samples / per_pack),
            source=f"{source}, packs 99 % full",
        )
    description = "the longest of a step"
    if data.pad_to == "micro_batch":
        left = GROUPED if data.order == "group_by_modality_length" else UNGROUPED
        of_step, description = round(text + left * (of_step - text)), "the longest of a micro-batch, on average"
    multiple = config.length_multiple()
    length, worst = (-(-(patches + text) // multiple) * multiple for text in (of_step, of_run))
    return Workload(
        length=length,
        longest=worst,
        positions=position,
        squares=squares,
        padded_squares=float(length) ** 2,
        images=1.0,
        head_rows=trained * text,
        sequences=samples,
        source=f"{source}, padded to {length} ({description}; {worst} at the longest)",
    )
