"""What a checkpoint remembers of the data, beside how much of it was consumed: everything that decides which tensors step k trains on.

A run that resumes compares it with its own, name by name. Data-parallel size, workers and the place of the files are not in it: they change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.sampling.blend import BlendedIndex
from megatron_share4v.data.sampling.sampler import Sampler

FingerprintValue = str | int | float | None


def describe_data(plan: Sampler, encoder: Encoder) -> dict[str, FingerprintValue]:
    """Order of the samples, the data sets themselves, and how samples become ids, labels and pixels."""
    described: dict[str, FingerprintValue] = dict(plan.spec)
    if isinstance(plan.index, BlendedIndex):
        described |= {
            f"data set {part.name}": f"{part.index.fingerprint[:12]} x {part.epochs:g} epochs"
            for part in plan.index.parts
        }
    described |= {
        "tokenizer": encoder.tokenizer.fingerprint,
        "template": encoder.template.name,
        "max_text_length": encoder.max_text_length,
    }
    return described | {f"image policy {name}": value for name, value in asdict(encoder.images).items()}


def fingerprint_differences(saved: Mapping[str, FingerprintValue], now: Mapping[str, FingerprintValue]) -> list[str]:
    """`name: was A, is B` for each name whose value is not the same in both."""
    names = [*saved, *(name for name in now if name not in saved)]
    return [
        f"{name}: was {_shown(saved, name)}, is {_shown(now, name)}"
        for name in names
        if saved.get(name) != now.get(name)
    ]


def _shown(described: Mapping[str, FingerprintValue], name: str) -> str:
    value = described.get(name)
    if value is None:
        return "not set"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
