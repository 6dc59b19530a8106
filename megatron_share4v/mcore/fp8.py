"""Tensor-parallel linear layers whose products run in FP8 without Transformer Engine (ops/fp8_linear.py), and the way back for a moment.

Parameters, their names and their communication are core's: checkpoints do not know the difference. Scales are of each rank's own part of a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_share4v.ops.fp8_linear import fp8_linear


class _ProductInFp8:
    """Replaces the product of core's layer, which also does the communication on the input's side."""

    in_fp8 = True

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **others: Any,
    ) -> torch.Tensor:
        if not self.in_fp8:
            communication = {
                "allreduce_dgrad": allreduce_dgrad,
                "sequence_parallel": sequence_parallel,
                "tp_group": tp_group,
            }
            return super()._forward_impl(input=input, weight=weight, bias=bias, **communication, **others)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        how = {"precise_weight_grad": self.config.precise_weight_gradient, "implementation": self.config.ops}
        return fp8_linear(input, weight=weight, bias=bias, **how)


class Fp8ColumnParallelLinear(_ProductInFp8, ColumnParallelLinear):
    """Core's, in FP8."""


class Fp8RowParallelLinear(_ProductInFp8, RowParallelLinear):
    """Core's, in FP8."""


@contextlib.contextmanager
def without_fp8(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """All products of `chunks` in the type of their weights, ours and Transformer Engine's."""
    own = [module for chunk in chunks for module in chunk.modules() if isinstance(module, _ProductInFp8)]
    configs = {
        id(module.config): module.config
        for chunk in chunks
        for module in chunk.modules()
        if getattr(getattr(module, "config", None), "fp8", None)
    }
    formats = {key: config.fp8 for key, config in configs.items()}
    try:
        for module in own:
            module.in_fp8 = False
        for config in configs.values():
            config.fp8 = None
        yield
    finally:
        for module in own:
            module.in_fp8 = True
        for key, config in configs.items():
            config.fp8 = formats[key]
