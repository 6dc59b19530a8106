"""Fingerprint of the data order for checkpoints: everything that decides which tensors step k trains on.

A resumed run compares it with its own, entry by entry. The data-parallel size, the workers and the location of the
files are not in it: they do not change the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.loading.encode import Encoder
from megatron_share4v.data.sampling.blend import BlendedIndex
from megatron_share4v.data.sampling.sampler import Sampler
from megatron_share4v.text.tokenizer_config import LEGACY_RULE

FingerprintValue = str | int | float | None


def describe_data(sampler: Sampler, encoder: Encoder) -> dict[str, FingerprintValue]:
    """Describe the sample order, the data sets, and how samples become ids, labels and pixels."""
    described: dict[str, FingerprintValue] = dict(sampler.spec)
    if isinstance(sampler.index, BlendedIndex):
        described |= {
            f"data set {member.name}": f"{member.index.fingerprint[:12]} x {member.epochs:g} epochs"
            for member in sampler.index.members
        }
    described |= {
        "tokenizer": encoder.tokenizer.fingerprint,
        "template": encoder.template.name,
        "max_text_length": encoder.max_text_length,
    }
    if encoder.tokenizer.rule not in (None, LEGACY_RULE):  # as it was before there were rules
        described["tokenizer_rule"] = encoder.tokenizer.rule
    if encoder.template.trained_markers != "answer_only":  # the only one when older checkpoints were written
        described["trained_markers"] = encoder.template.trained_markers
    return described | {f"image policy {name}": value for name, value in _describe_policy(encoder.images).items()}


def _describe_policy(policy: ImagePolicy) -> dict[str, FingerprintValue]:
    """Describe a policy, without the values that were the only ones when older checkpoints were written."""
    first = asdict(ImagePolicy(policy.image_size, policy.aspect_ratio))
    return {
        name: ", ".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in asdict(policy).items()
        if name in ("image_size", "aspect_ratio") or value != first[name]
    }


def fingerprint_differences(saved: Mapping[str, FingerprintValue], now: Mapping[str, FingerprintValue]) -> list[str]:
    """List `name: was A, is B` for each entry whose value differs."""
    names = [*saved, *(name for name in now if name not in saved)]
    return [
        f"{name}: was {_format_value(saved, name)}, is {_format_value(now, name)}"
        for name in names
        if saved.get(name) != now.get(name)
    ]


def _format_value(described: Mapping[str, FingerprintValue], name: str) -> str:
    value = described.get(name)
    if value is None:
        return "not set"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
