"""The metrics record of one step, from its plan, its result and what callbacks have measured."""

from __future__ import annotations

import torch

from megatron_share4v.observability.writers import StepRecord
from megatron_share4v.planner.gpus import known_gpu
from megatron_share4v.train.build import Training
from megatron_share4v.train.callbacks import StepState
from megatron_share4v.train.step_flops import step_flops


def make_step_record(training: Training, state: StepState) -> StepRecord:
    """Build the metrics of a finished step; rates are per rank."""
    config, mesh, items, result = training.config, training.mesh, state.data.items, state.result
    flops = step_flops(
        config,
        items,
        trained_tokens=result.trained_tokens,
        images_per_sample=training.source.index.rows["n_img"][items.rows],
    )
    consumed = training.source.sampler.consumed(state.step)
    rank_seconds = state.seconds * mesh.layout.world_size
    model_flops_per_s, hardware_flops_per_s = flops.model / rank_seconds, flops.hardware / rank_seconds
    gpu = known_gpu(torch.cuda.get_device_name()) if mesh.device.kind == "cuda" else None
    gap = state.fp8_gap
    return StepRecord(
        step=state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=config.optim.learning_rate * state.learning_rate_factor,
        consumed_samples=sum(consumed.values()),
        consumed_by_source=consumed if len(consumed) > 1 else {},
        trained_tokens=result.trained_tokens,
        tokens=items.tokens,
        images=items.images,
        padding_fraction=1.0 - items.tokens / items.positions,
        step_time_s=state.seconds,
        data_wait_s=state.data.wait_s,
        tokens_per_s_per_gpu=items.tokens / rank_seconds,
        model_tflops_per_s_per_gpu=model_flops_per_s / 1e12,
        mfu=model_flops_per_s / gpu.bf16 if gpu else None,
        hardware_tflops_per_s_per_gpu=hardware_flops_per_s / 1e12,
        hfu=hardware_flops_per_s / gpu.bf16 if gpu else None,
        peak_memory_bytes=mesh.device.peak_memory_bytes(),
        skipped=result.skipped,
        skip_reason=result.skip_reason,
        faulty_samples=state.faulty_samples,
        validation_loss=state.validation_loss,
        fp8_loss_gap=gap.loss if gap else None,
        fp8_norm_gap=gap.grad_norm if gap else None,
        goodput_accounts=state.goodput_accounts,
    )
