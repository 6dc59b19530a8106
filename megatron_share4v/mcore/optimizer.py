"""DDP gradient buffers and AdamW through megatron-core: per-component learning rates, sharded optimizer state.

Core's optimizer is always torch's AdamW here, which counts steps per parameter; core restores these counts wrongly, so
the functions at the end do it for mcore/dist_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast

import megatron.core.optimizer as core_optimizer
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.transformer.module import MegatronModule

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.training import OptimConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.mcore.schedule import TimedDDP, set_schedule_hooks
from megatron_share4v.ops.adamw_optimizer import FusedAdamW
from megatron_share4v.ops.op import Implementation

__all__ = [
    "MegatronOptimizer",
    "TimedDDP",
    "build_optimizer",
    "clip_gradients",
    "gather_updated_params",
    "optimizer_shards",
    "set_learning_rate",
    "squared_grad_norm",
    "unwrap_model",
    "wrap_ddp",
]


TIED_ROUNDING_NUMBER = 1 << 32
"""Number of a tied embedding for stochastic rounding, beyond the indices of all parameters."""


def wrap_ddp(
    chunks: Sequence[torch.nn.Module],
    *,
    mesh: Mesh,
    parallel: ParallelConfig,
    gradients: Literal["fp32", "bf16"] = "fp32",
    bucket_elements: int | None = None,
) -> list[TimedDDP]:
    """Wrap chunks in DDP: gradient buffers for trainable parameters, reduced over the DP group.

    `gradients`: bf16 buffers need bf16 weights. `bucket_elements`: approximate bucket size where communication
    overlaps; None: core's default, 40 million or more.
    """
    config = chunks[0].config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradients == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=bucket_elements,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    wrapped = [
        # Later chunks of a rank have nothing to overlap with, as in core's own set-up.
        TimedDDP(config, settings, chunk, disable_bucketing=number > 0, pg_collection=mesh.groups)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        set_schedule_hooks(chunk.config, wrapped, overlap_grad_reduce=parallel.overlap_grad_reduce)
    return wrapped


def gather_updated_params(chunks: Sequence[torch.nn.Module]) -> None:
    """All-gather the updated weights before anything but a training step reads them. Collective.

    With overlap_param_gather, only the next forward pass of a training step gathers them by itself.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrap_model(chunk: torch.nn.Module) -> MegatronModule:
    """Return the model chunk inside its DDP wrapper."""
    return cast(MegatronModule, chunk.module if isinstance(chunk, DistributedDataParallel) else chunk)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    optim: OptimConfig,
    *,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    seed: int = 0,
) -> MegatronOptimizer:
    """Build AdamW with fp32 main weights. Each parameter group has `max_lr`, which the schedule scales.

    `seed` is for stochastic rounding.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.learning_rate,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        clip_grad=optim.clip_grad_norm,
    )
    # Where Transformer Engine or apex is installed, core would take its FusedAdam, which counts steps per group; a
    # resume restores the counts of parameters, so its bias correction would start again.
    core_optimizer.USING_PYTORCH_OPTIMIZER = True
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=_config_overrides(optim))
    for group in optimizer.param_groups:
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    layer_config = cast(LayerConfig, unwrap_model(chunks[0]).config)
    _use_fused_adamw(optimizer, optim, ops=layer_config.ops, seed=seed)
    _init_optimizer_state(optimizer)
    _round_tied_copies_alike(optimizer)
    return optimizer


def _use_fused_adamw(optimizer: MegatronOptimizer, optim: OptimConfig, *, ops: Implementation, seed: int) -> None:
    """Use FusedAdamW, or torch's fused AdamW when `ops` is "reference" and nothing needs FusedAdamW."""
    for group in optimizer.param_groups:
        group["fused"] = True
    bf16_moments = optim.moments == "bf16"
    if ops == "native" or bf16_moments or optim.offload:
        options: dict[str, Any] = {"seed": seed, "average_dtype": torch.bfloat16} if bf16_moments else {}
        for part in chained_optimizers(optimizer):
            part.optimizer = FusedAdamW.in_place_of(
                part.optimizer, on_host=optim.offload, implementation=ops, **options
            )


def _config_overrides(optim: OptimConfig) -> dict[ParamKey, dict[str, float]]:
    """Learning rates by component; no weight decay on vectors."""
    is_vector = ParamPredicate(name="vector", fn=lambda parameter: parameter.dim() < 2)
    overrides: dict[ParamKey, dict[str, float]] = {ParamKey(predicate=is_vector): {"wd_mult": 0.0}}
    for component, rate in (("projector", optim.projector_learning_rate), ("vision", optim.vision_learning_rate)):
        if rate is not None:
            predicate = ParamPredicate(
                name=component, fn=lambda parameter, component=component: parameter.component == component
            )
            overrides[ParamKey(predicate=predicate)] = {"max_lr": rate}
    return overrides


def set_learning_rate(optimizer: MegatronOptimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its `max_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor


@torch.no_grad()
def squared_grad_norm(optimizer: MegatronOptimizer, *, device: torch.device) -> torch.Tensor:
    """Return the squared global L2 norm of the gradients, [1] fp32, without a host sync. Collective.

    Call after optimizer.prepare_grads(). Core's own function returns a host number and syncs once per weight where
    neither Transformer Engine nor apex is installed.
    """
    gradients = [
        gradient
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for gradient in part.get_main_grads_for_grad_norm()
    ]
    squared = torch.nn.utils.get_total_norm(gradients).square().view(1) if gradients else torch.zeros(1, device=device)
    dist.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    return squared


def clip_gradients(optimizer: MegatronOptimizer, *, max_norm: float, norm: float) -> None:
    """Scale gradients of global L2 norm `norm` down to `max_norm`.

    FusedAdamW scales gradients as it reads them. Core's own function would compute the norm again.
    """
    coefficient = max_norm / (norm + 1e-6)  # as in core and torch
    for part in chained_optimizers(optimizer):
        if not isinstance(part.optimizer, FusedAdamW):
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm, norm)
        elif coefficient < 1.0 and part.get_parameters():
            part.optimizer.gradient_scale = torch.full(
                (1,), coefficient, dtype=torch.float32, device=part.get_parameters()[0].device
            )


def chained_optimizers(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """Yield core's optimizers inside its chain; none on a pipeline stage that trains nothing."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part


@dataclass(frozen=True)
class OptimizerShard:
    """Part of the fp32 weight and moments of one trained parameter on this rank, from flat position `start` on."""

    parameter: torch.nn.Parameter
    start: int
    tensors: dict[str, torch.Tensor]


def optimizer_shards(part: MegatronOptimizer) -> Iterator[OptimizerShard]:
    """Return this rank's shards of one of core's optimizers."""
    return _distributed_shards(part) if isinstance(part, DistributedOptimizer) else _unsharded_shards(part)


def _distributed_shards(part: DistributedOptimizer) -> Iterator[OptimizerShard]:
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, position = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][position]
                    yield OptimizerShard(parameter, ranges["param"].start, _state_tensors(part, main))


def _unsharded_shards(part: MegatronOptimizer) -> Iterator[OptimizerShard]:
    if isinstance(part, Float16OptimizerWithFloat16Params):
        halves, mains = (chain.from_iterable(groups) for groups in (part.float16_groups, part.fp32_from_float16_groups))
        pairs = [*zip(halves, mains), *((main, main) for main in chain.from_iterable(part.fp32_from_fp32_groups))]
    else:
        pairs = [(main, main) for group in part.param_groups for main in group["params"]]
    for parameter, main in pairs:
        yield OptimizerShard(parameter, 0, _state_tensors(part, main))


def _state_tensors(part: MegatronOptimizer, main: torch.Tensor) -> dict[str, torch.Tensor]:
    state = part.optimizer.state[main]
    return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def _adam_states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any], torch.device]]:
    """Yield each parameter, its state, and the device of its step count.

    The device is the parameter's for a fused update, else the CPU.
    """
    for part in chained_optimizers(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield (
                    parameter,
                    part.optimizer.state[parameter],
                    parameter.device if group["fused"] else torch.device("cpu"),
                )


def _init_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Create the state of every parameter.

    AdamW creates it at the first step, but a checkpoint may be written or read before.
    """
    for part in chained_optimizers(optimizer):
        if isinstance(part.optimizer, FusedAdamW):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    part.optimizer.state_of(parameter)
    for parameter, state, device in _adam_states(optimizer):
        if not state:
            state.update(
                exp_avg=torch.zeros_like(parameter),
                exp_avg_sq=torch.zeros_like(parameter),
                step=torch.tensor(0.0, device=device),
            )


def _round_tied_copies_alike(optimizer: MegatronOptimizer) -> None:
    """Give both copies of a tied embedding the same random bits, which would else follow from the parameter's index."""
    for part in chained_optimizers(optimizer):
        for shard in optimizer_shards(part):
            if getattr(shard.parameter, "shared_embedding", False):
                main: Any = shard.tensors["param"]
                main.rounding_number = TIED_ROUNDING_NUMBER


def step_counts(optimizer: MegatronOptimizer) -> Iterable[int]:
    """Return the number of updates of each parameter."""
    return [int(state["step"]) for _, state, _ in _adam_states(optimizer)]


def restore_step_counts(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the step count of each parameter after loading; a shared tensor would advance once per parameter."""
    for _, state, device in _adam_states(optimizer):
        state["step"] = torch.tensor(float(step), device=device)
