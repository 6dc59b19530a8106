"""Tensor-parallel linear layers with FP8 matrix products without Transformer Engine (ops/fp8_linear.py).

Parameters, their names and communication are core's, so checkpoints are the same with and without FP8. Scales are per
rank: of its own shard of a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.ops.fp8_linear import fp8_linear

if TYPE_CHECKING:  # the mixin goes before either of core's classes
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear as _Base
else:
    _Base = object


class _Fp8Linear(_Base):
    """Mixin that replaces the matrix product of core's layer and does the communication of its input."""

    config: LayerConfig
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
            return super()._forward_impl(
                input=input,
                weight=weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **others,
            )
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return fp8_linear(
            input,
            weight=weight,
            bias=bias,
            precise_weight_grad=self.config.precise_weight_gradient,
            implementation=self.config.ops,
        )


class Fp8ColumnParallelLinear(_Fp8Linear, ColumnParallelLinear):
    """Core's ColumnParallelLinear in FP8."""


class Fp8RowParallelLinear(_Fp8Linear, RowParallelLinear):
    """Core's RowParallelLinear in FP8."""


@contextlib.contextmanager
def without_fp8(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Run all products of `chunks`, ours and Transformer Engine's, in the dtype of their weights."""
    own = [module for chunk in chunks for module in chunk.modules() if isinstance(module, _Fp8Linear)]
    all_configs = (getattr(module, "config", None) for chunk in chunks for module in chunk.modules())
    configs: dict[int, Any] = {id(config): config for config in all_configs if getattr(config, "fp8", None)}
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
