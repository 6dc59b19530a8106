"""Sample tokens from logits: penalties, filters, and noise that depends only on seed and token index.

R rows, one per request that gets a token in this step; V ids of the tokenizer. Repetition penalty: Keskar et al. 2019
(CTRL, section 4.1); presence and frequency penalties: OpenAI's. Nucleus (top-p): Holtzman et al. 2020. Tokens are drawn
by the Gumbel-max trick (argmax after independent noise): unlike inverse-CDF sampling, rounding in unrelated tokens does
not change the draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_share4v.infer.request import SamplingParams, TokenLogprobs

GREEDY_TEMPERATURE = 1e-3
_CANDIDATES = 256
"""Ids searched for the nucleus first; sorting all ids takes twenty times as long."""


@dataclass(frozen=True)
class SamplingRow:
    """Sampling state of one request, about to get token number len(generated).

    prompt_ids: distinct prompt ids without image slots. forbidden: ids that may not be sampled in this step.
    """

    sampling: SamplingParams
    seed: int
    prompt_ids: frozenset[int]
    generated: Sequence[int]
    forbidden: frozenset[int] = frozenset()


def sample_tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Sample one id per row from fp32 logits [R, V]."""
    logits = _apply_penalties(logits, rows)
    chosen = logits.argmax(dim=-1)
    drawn = [number for number, row in enumerate(rows) if row.sampling.temperature > GREEDY_TEMPERATURE]
    if drawn:
        places = torch.tensor(drawn, device=logits.device)
        chosen[places] = _sample_random(logits[places], [rows[number] for number in drawn])
    return chosen.tolist()


def compute_logprobs(logits: torch.Tensor, ids: Sequence[int], *, alternatives: int) -> list[TokenLogprobs]:
    """Log-probabilities of `ids` [R] under raw logits [R, V], with the top `alternatives` ids of each row."""
    values = logits.log_softmax(dim=-1)
    chosen = values.gather(1, torch.tensor(ids, device=values.device).unsqueeze(1)).squeeze(1).tolist()
    top = values.topk(min(alternatives, values.size(1)), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist())
    return [TokenLogprobs(chosen=value, top=tuple(zip(*pair))) for value, pair in zip(chosen, pairs)]


def _apply_penalties(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Apply penalties and forbidden ids; copies the logits when anything changes."""
    changed = logits
    for number, row in enumerate(rows):
        given = row.sampling
        if not (row.forbidden or given.repetition_penalty != 1.0 or given.presence_penalty or given.frequency_penalty):
            continue
        if changed is logits:
            changed = logits.clone()
        values = changed[number]
        if given.repetition_penalty != 1.0 and (row.prompt_ids or row.generated):
            seen = torch.tensor(sorted(row.prompt_ids.union(row.generated)), device=values.device)
            found = values[seen]
            values[seen] = torch.where(found > 0, found / given.repetition_penalty, found * given.repetition_penalty)
        if row.generated and (given.presence_penalty or given.frequency_penalty):
            ids, counts = torch.tensor(row.generated, device=values.device).unique(return_counts=True)
            values[ids] -= given.presence_penalty + given.frequency_penalty * counts
        if row.forbidden:
            values[torch.tensor(sorted(row.forbidden), device=values.device)] = float("-inf")
    return changed


def _sample_random(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Sample ids [R] after temperature, top-k, top-p and min-p, in this order. Ties at a threshold are kept."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(row.sampling, name) for row in rows], device=logits.device).unsqueeze(1)

    logits = logits / column("temperature")
    logits = logits - logits.max(dim=-1, keepdim=True).values
    if any(row.sampling.top_k for row in rows):
        logits = _mask_top_k(logits, [row.sampling.top_k for row in rows])
    if any(row.sampling.top_p < 1.0 for row in rows):
        logits = _mask_top_p(logits, column("top_p"))
    if any(row.sampling.min_p for row in rows):
        logits = logits.masked_fill(logits < column("min_p").log(), float("-inf"))
    noise = torch.stack([_gumbel_noise(row.seed, len(row.generated), logits.size(1)) for row in rows])
    return (logits + noise.to(logits.device)).argmax(dim=-1)


def _mask_top_k(logits: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    size = logits.size(1)
    limits = torch.tensor([min(count or size, size) for count in counts], device=logits.device).unsqueeze(1)
    largest = logits.topk(max((min(count, size) for count in counts if count), default=1), dim=-1).values
    edge = largest.gather(1, limits.clamp(max=largest.size(1)) - 1)
    return logits.masked_fill((logits < edge) & (limits < size), float("-inf"))


def _mask_top_p(logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of most likely ids with at least `share` [R, 1] of the probability."""
    total = logits.exp().sum(dim=-1, keepdim=True)
    largest = logits.topk(min(_CANDIDATES, logits.size(1)), dim=-1).values
    mass = largest.exp().cumsum(dim=-1) / total
    if bool(((mass[:, -1:] < share) & (share < 1.0)).any()):
        largest = logits.sort(dim=-1, descending=True).values
        mass = largest.exp().cumsum(dim=-1) / total
    last = (mass < share).sum(dim=-1, keepdim=True).clamp(max=largest.size(1) - 1)
    edge = largest.gather(1, last)
    return logits.masked_fill((logits < edge) & (share < 1.0), float("-inf"))


def _gumbel_noise(seed: int, number: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise [size] for the `number`-th token of a request."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # rand returns multiples of 2**-24 from 0 on; 0 would give infinite noise.
    uniform = torch.rand(size, generator=generator) + 2.0**-25
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))
