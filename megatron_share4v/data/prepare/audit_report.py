"""Report of an audit: findings, sources, lengths, padding, packing; and the length histogram as an image.

N samples that can be trained; a sample's length includes its image slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_share4v.data.prepare.audit import INFORMATION, AuditResult
from megatron_share4v.data.prepare.record_keys import describe_unread
from megatron_share4v.data.sampling.orders import modality_length_order, random_order
from megatron_share4v.data.sampling.packing import Packing, pack_samples

BINS, BAR = 20, 50
QUANTILES = (0.5, 0.95, 1.0)


@dataclass(frozen=True)
class BatchShape:
    """Batch settings of the run.

    tokens_per_image: positions of an image; pad_multiple: sequence lengths are rounded up to it; pack_length: positions
    of a pack.
    """

    tokens_per_image: int = 576
    micro_batch_size: int = 8
    global_batch_size: int = 128
    pad_multiple: int = 8
    pack_length: int = 4096


@dataclass(frozen=True)
class Padding:
    """Fraction of padded positions.

    micro_batch: with every micro-batch as long as its longest sample; step: with every step as long as its longest
    sample.
    """

    order: str
    micro_batch: float
    step: float


@dataclass(frozen=True)
class PackingEstimate:
    """Estimate for packed sequences.

    packs: sequences of pack_length. fill: fraction of their positions without padding. too_long: samples that fit into
    none.
    """

    packs: int
    fill: float
    samples_per_pack: float
    too_long: int


def sample_lengths(audit: AuditResult, shape: BatchShape) -> np.ndarray:
    """[N] int64 positions of each sample, image slots included."""
    return audit.facts["n_tok"].astype(np.int64) + audit.facts["n_img"].astype(np.int64) * (shape.tokens_per_image - 1)


def estimate_padding(audit: AuditResult, shape: BatchShape) -> list[Padding]:
    """Padding for the random order and group_by_modality_length, over whole steps; empty without a whole step."""
    lengths = sample_lengths(audit, shape)
    whole = len(lengths) // shape.global_batch_size * shape.global_batch_size
    if not whole:
        return []
    grouped = modality_length_order(
        audit.facts["words"], group_size=shape.global_batch_size, batch_size=shape.micro_batch_size, seed=0, epoch=0
    )
    orders = {"random": random_order(len(lengths), seed=0, epoch=0), "group_by_modality_length": grouped}
    found = []
    for name, order in orders.items():
        ordered = lengths[order[:whole]]
        shares = [
            1 - ordered.sum() / _padded(ordered, size, shape.pad_multiple)
            for size in (shape.micro_batch_size, shape.global_batch_size)
        ]
        found.append(Padding(name, *shares))
    return found


def estimate_packing(audit: AuditResult, shape: BatchShape) -> PackingEstimate:
    """Pack the samples in a random order into sequences of pack_length."""
    lengths = sample_lengths(audit, shape)
    rows = random_order(len(lengths), seed=0, epoch=0)
    rows = rows[lengths[rows] <= shape.pack_length]
    packs = len(pack_samples(rows, lengths[rows], Packing(length=shape.pack_length)))
    positions = max(packs * shape.pack_length, 1)
    return PackingEstimate(
        packs, float(lengths[rows].sum() / positions), len(rows) / max(packs, 1), len(lengths) - len(rows)
    )


def format_report(audit: AuditResult, shape: BatchShape, *, allowed: Sequence[str] = ()) -> str:
    """Format the whole audit; findings of an `allowed` kind are marked."""
    parts = [_findings(audit, allowed), _sources(audit, shape)]
    if len(audit.facts):
        parts += [_lengths(audit, shape), _images(audit), _batching(audit, shape)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _padded(lengths: np.ndarray, size: int, multiple: int) -> int:
    """Positions of all batches of `size`, each padded to its longest sample."""
    longest = lengths.reshape(-1, size).max(axis=1)
    return int((-(-longest // multiple) * multiple).sum()) * size


def _findings(audit: AuditResult, allowed: Sequence[str]) -> Iterator[str]:
    failures = sum(count for kind, count in audit.counts.items() if kind not in INFORMATION)
    yield f"{audit.records} records, {len(audit.facts)} can be trained, {failures} findings"
    for kind, count in audit.counts.most_common():
        note = " (information)" if kind in INFORMATION else " (allowed)" if kind in allowed else ""
        yield f"  {count:>9} {kind}{note}"
        yield from (f"            {finding.where}: {finding.reason}" for finding in audit.examples[kind])
    if audit.unread:
        yield f"  keys that are not read: {describe_unread(audit.unread)}"
    if audit.duplicates and audit.duplicates.shared:
        yield f"  {audit.duplicates.shared:>9} samples share another's image (no finding: it is stored once)"


def _sources(audit: AuditResult, shape: BatchShape) -> Iterator[str]:
    yield f"{'source':<24}{'records':>10}{'refused':>10}{'images':>10}{'mean length':>13}{'95 %':>8}{'trained':>9}"
    lengths = sample_lengths(audit, shape)
    for number, name in sorted(enumerate(audit.sources), key=lambda pair: pair[1]):
        mine = audit.facts["source"] == number
        facts, own = audit.facts[mine], lengths[mine]
        refused = audit.refused[name]
        line = (
            f"{name:<24}{len(facts) + refused:>10}{refused:>10}{len(np.unique(facts['path'][facts['n_img'] > 0])):>10}"
        )
        if len(facts):
            line += f"{own.mean():>13.0f}{np.quantile(own, 0.95):>8.0f}{facts['n_lab'].sum() / own.sum():>9.1%}"
        yield line


def _lengths(audit: AuditResult, shape: BatchShape) -> Iterator[str]:
    lengths = sample_lengths(audit, shape)
    yield f"length in positions, an image as {shape.tokens_per_image}: mean {lengths.mean():.0f}, " + _quantiles(
        lengths
    )
    counts, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    for count, start, stop in zip(counts, edges, edges[1:]):
        yield f"  {start:>6.0f} ..{stop:>6.0f} {count:>9} {'#' * round(BAR * count / counts.max())}"
    cut = audit.facts["full_tok"] > audit.facts["n_tok"]
    lost = int((audit.facts["full_lab"] - audit.facts["n_lab"]).sum())
    yield f"  {cut.sum()} samples are cut, {lost} trained positions are lost"


def _images(audit: AuditResult) -> Iterator[str]:
    with_image = audit.facts[audit.facts["n_img"] > 0]
    yield f"images: {len(with_image)} samples have one, {len(audit.facts) - len(with_image)} are text only"
    if len(with_image):
        yield f"  longer side in pixels: {_quantiles(np.maximum(with_image['width'], with_image['height']))}"
        yield f"  encoded size in kB: {_quantiles(with_image['length'] / 1000)}"


def _batching(audit: AuditResult, shape: BatchShape) -> Iterator[str]:
    yield f"padding, micro-batch {shape.micro_batch_size}, global batch {shape.global_batch_size}:"
    found = estimate_padding(audit, shape)
    for row in found:
        per_micro_batch = f"{row.micro_batch:>7.1%} with micro-batches as long as their longest"
        yield f"  {row.order:<26}{per_micro_batch}, {row.step:>7.1%} with steps as long"
    if not found:
        yield "  fewer samples than one global batch"
    packs = estimate_packing(audit, shape)
    yield (
        f"packing to {shape.pack_length}: {packs.fill:.1%} filled, {packs.packs} packs, "
        f"{packs.samples_per_pack:.1f} samples each"
        + (f", {packs.too_long} samples are too long" if packs.too_long else "")
    )


def _quantiles(values: np.ndarray) -> str:
    return ", ".join(f"{'max' if q == 1 else f'{q:.0%}'} {np.quantile(values, q):.0f}" for q in QUANTILES)
