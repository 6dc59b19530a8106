"""Formulas of adapters: the merged value of one weight from the base's value and the adapter's factors.

Sums are computed in fp32 and rounded once to the base's dtype. O outputs, I inputs, r rank of a module's weight [O, I].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_share4v.checkpoint.hf.adapters.config import AdapterConfig, Residual
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, LazyTensors
from megatron_share4v.errors import ConversionError

Factors = Mapping[str, LazyTensor]
"""Adapter tensors of one module, by the part of their name after the module's."""

FACTORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "LORA": (
        ("lora_A", "lora_B"),
        ("lora_A", "lora_B", "lora_magnitude_vector"),
        ("lora_embedding_A", "lora_embedding_B"),
    ),
    "LOHA": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "LOKR": tuple(
        (*one, *other)
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for other in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "IA3": (("ia3_l",),),
}
"""Sets of factors that a module of each kind has."""
FACTOR_NAMES = sorted({name for sets in FACTORS.values() for names in sets for name in names})
_RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
_RANK_AXIS |= {"hada_w1_a": 1, "hada_w1_b": 0, "hada_w2_a": 1, "hada_w2_b": 0}
_RANK_AXIS |= {"lokr_w1_a": 1, "lokr_w1_b": 0, "lokr_w2_a": 1, "lokr_w2_b": 0}


@dataclass(frozen=True, kw_only=True)
class MergedWeight:
    """Reader of a merged weight: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA), Hyeon-Woo et al. 2022 (LoHa), Yeh et
    al. 2024 (LoKr) and Liu et al. 2022 (IA3).
    """

    base: LazyTensor
    factors: Factors
    scale: float
    residual: Residual | None = None

    def __call__(self) -> torch.Tensor:
        """Read base and factors and return the merged weight."""
        base = self.base.read().float()
        factors = {name: tensor.read().float() for name, tensor in self.factors.items()}
        if "ia3_l" in factors:
            return (base * factors["ia3_l"]).to(self.base.dtype)
        if self.residual is not None:
            # The adapter was trained on the residual in the base's dtype.
            initial = initial_product(base, rank=factors["lora_A"].shape[0], scale=self.scale, method=self.residual)
            base = (base - initial).to(self.base.dtype).float()
        merged = base + (product(factors) * self.scale).view_as(base)
        if "lora_magnitude_vector" in factors:
            merged *= (factors["lora_magnitude_vector"].flatten() / torch.linalg.norm(merged, dim=1))[:, None]
        return merged.to(self.base.dtype)


def product(factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the unscaled change of a weight: [O, I], or [vocabulary, W] for an embedding."""
    if "lora_embedding_A" in factors:
        return (factors["lora_embedding_B"] @ factors["lora_embedding_A"]).t()
    if "lora_A" in factors:
        return factors["lora_B"] @ factors["lora_A"]
    if "hada_w1_a" in factors:
        return (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    one, other = (
        factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(one, other)


def initial_product(base: torch.Tensor, *, rank: int, scale: float, method: Residual) -> torch.Tensor:
    """Return the scaled product of an adapter's initial factors, which was taken out of the base: [O, I].

    pissa (Meng et al. 2024): the best approximation of that rank, whatever the scale. olora (Büyükakyüz 2024): scale
    times the projection onto the first columns. The signs of the factors do not matter.
    """
    if method == "pissa":
        left, values, right = torch.linalg.svd(base, full_matrices=False)
        return (left[:, :rank] * values[:rank]) @ right[:rank]
    basis, _ = torch.linalg.qr(base[:, :rank])
    return scale * (basis @ (basis.t() @ base))


def check_factors(module: str, base: LazyTensor, factors: Factors, *, config: AdapterConfig) -> None:
    """Raise ConversionError when the factors are incomplete, of another rank than stated, or do not fit the base."""
    if not any(set(names) == set(factors) for names in FACTORS[config.kind]):
        raise ConversionError(
            f"{module} has {', '.join(sorted(factors))}, which is no complete set of {config.kind} factors; "
            "copy the adapter again"
        )
    if config.decomposed != ("lora_magnitude_vector" in factors) and "lora_A" in factors:
        raise ConversionError(
            f"{module} has {'no ' if config.decomposed else 'a '}lora_magnitude_vector, and {config.path} states "
            f"use_dora {config.decomposed}; copy the adapter again"
        )
    for name, tensor in factors.items():
        axis = _RANK_AXIS.get(name)
        if len(tensor.shape) != 2 and name != "lora_magnitude_vector":
            raise ConversionError(f"wrong shape: {module}.{name} is {tensor.shape}; only matrices are merged")
        if axis is not None and config.kind != "LOKR" and tensor.shape[axis] != config.rank_of(module):
            raise ConversionError(
                f"wrong shape: {module}.{name} is {tensor.shape}, and {config.path} states rank "
                f"{config.rank_of(module)}; copy the adapter again"
            )
    if not _fits(factors, base):
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in sorted(factors.items()))
        raise ConversionError(f"wrong shape: {module} is {base.shape} in the base, and in the adapter {shapes}")


def scaled_bias(base: LazyTensors, name: str, factors: Factors) -> LazyTensor | None:
    """Return the bias that goes with a merged IA3 weight `name`: scaled as the outputs are; None for other weights."""
    scales = factors.get("ia3_l")
    bias = base.get(f"{name.removesuffix('weight')}bias")
    if scales is None or bias is None or scales.shape[1] != 1:
        return None
    return LazyTensor(bias.shape, bias.dtype, bias.origin, _ScaledBias(bias, scales))


@dataclass(frozen=True)
class _ScaledBias:
    bias: LazyTensor
    scales: LazyTensor

    def __call__(self) -> torch.Tensor:
        return (self.bias.read().float() * self.scales.read().float().flatten()).to(self.bias.dtype)


def _fits(factors: Factors, base: LazyTensor) -> bool:
    """Return whether the factors change a weight of the base's shape; computed on the meta device."""
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in factors.items()}
    magnitude = empty.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.numel() != base.shape[0]:
        return False
    try:
        if "ia3_l" in empty:
            return tuple((torch.empty(base.shape, device="meta") * empty["ia3_l"]).shape) == base.shape
        return tuple(product(empty).shape) == base.shape
    except RuntimeError:  # the factors do not fit each other
        return False
