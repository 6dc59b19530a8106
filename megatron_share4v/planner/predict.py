"""Prediction for a case: step time and its parts, memory of each rank, utilisation, hours, and reasons why it cannot
run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_share4v.model.flops import hardware_flops, model_flops
from megatron_share4v.planner.case import Case
from megatron_share4v.planner.cost import (
    Traffic,
    data_bandwidth,
    data_bytes,
    embedding_seconds,
    message_seconds,
    stage_seconds,
    traffic,
    trained_weights,
    update_seconds,
)
from megatron_share4v.planner.memory import Memory, activations, logits, model_state_memory, workspace
from megatron_share4v.planner.schedule import TimedPass, peak_in_flight, simulate_schedule


@dataclass(frozen=True)
class Prediction:
    """Predicted time, memory and utilisation of a case; nothing is measured."""

    case: Case

    @cached_property
    def memory(self) -> list[Memory]:
        """Memory of each pipeline rank."""
        return [rank_memory(self.case, rank) for rank in range(self.case.layout.pipeline)]

    @property
    def needed(self) -> float:
        """Bytes of the rank that needs the most memory, with fragmentation and reserve."""
        assumed = self.case.assumptions
        return max(memory.total for memory in self.memory) * (1 + assumed.fragments) + assumed.reserve

    @cached_property
    def stages(self) -> list[tuple[float, float]]:
        """(forward, backward) seconds of a micro-batch in each stage."""
        return [
            (stage_seconds(self.case, stage, "forward"), stage_seconds(self.case, stage, "backward"))
            for stage in range(len(self.case.counts))
        ]

    @cached_property
    def loads(self) -> list[float]:
        """Busy seconds of each pipeline rank per micro-batch."""
        return [
            sum(sum(self.stages[stage]) for stage in self.case.stages(rank))
            for rank in range(self.case.layout.pipeline)
        ]

    @property
    def imbalance(self) -> float:
        """Busy time of the slowest pipeline rank over the mean, minus one."""
        return max(self.loads) * len(self.loads) / sum(self.loads) - 1

    @cached_property
    def timeline(self) -> list[list[TimedPass]]:
        """Schedule of each pipeline rank, without gradient reduction and update."""
        layout = self.case.layout
        took = {"forward": 0, "backward": 1}
        return simulate_schedule(
            lambda stage, kind: self.stages[stage][took[kind]],
            pipeline=layout.pipeline,
            virtual=layout.virtual,
            micro_batches=self.case.micro_batches,
            message=message_seconds(self.case),
        )

    @cached_property
    def pipeline_s(self) -> float:
        """Seconds from the first forward pass to the last backward pass."""
        return max(row[-1].end for row in self.timeline)

    @property
    def least_pipeline_s(self) -> float:
        """Lower bound of `pipeline_s`: work of the slowest rank, plus one micro-batch passing the stages before it
        forward and backward.
        """
        slowest = max(range(len(self.loads)), key=lambda rank: self.loads[rank])
        return self.loads[slowest] * self.case.micro_batches + sum(sum(times) for times in self.stages[:slowest])

    @property
    def bubble(self) -> float:
        """Fraction of the pipeline time that ranks are idle, stage imbalance included."""
        return max(0.0, 1 - sum(self.loads) * self.case.micro_batches / (self.pipeline_s * len(self.loads)))

    @cached_property
    def after_s(self) -> float:
        """Seconds of exposed DP communication and optimizer update on the slowest rank."""
        return max(self._after(rank) for rank in range(self.case.layout.pipeline))

    def _after(self, rank: int) -> float:
        case, trained = self.case, trained_weights(self.case, rank)
        reduce, gather = (size / (data_bandwidth(case) * case.assumptions.links) for size in data_bytes(case, trained))
        if (
            case.config.parallel.overlap_grad_reduce
        ):  # hidden behind the last micro-batch's backward pass, but for its last bucket
            reduce = max(0.1 * reduce, reduce - 0.9 * sum(self.stages[stage][1] for stage in case.stages(rank)))
        if (
            case.config.parallel.overlap_param_gather
        ):  # and behind the first one's forward pass, but for the weights that it begins with
            gather = max(0.1 * gather, gather - 0.9 * sum(self.stages[stage][0] for stage in case.stages(rank)))
        return reduce + embedding_seconds(case, rank) + gather + update_seconds(case, trained)

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.pipeline_s + self.after_s + self.case.assumptions.step_s

    @property
    def least_step_s(self) -> float:
        """Lower bound of `step_s`, without simulating the schedule."""
        return self.least_pipeline_s + self.after_s + self.case.assumptions.step_s

    @property
    def traffic(self) -> Traffic:
        """Bytes sent per rank and step, by parallel axis."""
        return traffic(self.case)

    @property
    def model_tflops(self) -> float:
        """Model TFLOP/s per GPU, without padding."""
        case = self.case
        flops = model_flops(case.config.model, case.workload.real(case.config.train.global_batch_size))
        return flops / self.step_s / case.layout.world_size / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation relative to the BF16 peak, for FP8 runs too, so that both compare."""
        return self.model_tflops * 1e12 / self.case.gpu.bf16

    @property
    def fp8_mfu(self) -> float | None:
        """MFU relative to the FP8 peak; None without FP8 layers or FP8 tensor cores."""
        gpu, fp8 = self.case.gpu, self.case.config.precision.fp8
        return self.model_tflops * 1e12 / gpu.fp8 if gpu.fp8 and fp8 != "none" else None

    @property
    def utilisation(self) -> str:
        """MFU as text, with the peak it is relative to."""
        both = f" of the BF16 peak, {self.fp8_mfu:.1%} of the FP8 peak" if self.fp8_mfu is not None else ""
        return f"MFU {self.mfu:.1%}{both}"

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation, with padding and recomputation, relative to the BF16 peak."""
        case = self.case
        flops = hardware_flops(
            case.config.model, case.workload.done(case.config.train.global_batch_size), case.execution
        )
        return flops / self.step_s / case.layout.world_size / case.gpu.bf16

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Positions per second and GPU, without padding."""
        case = self.case
        return case.workload.positions * case.config.train.global_batch_size / self.step_s / case.layout.world_size

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None when the number of samples is unknown."""
        train, sequences = self.case.config.train, self.case.workload.sequences
        return train.total_steps(sequences) if sequences else train.steps

    @property
    def hours(self) -> float | None:
        """Hours of the whole run, without validation, checkpoints and restarts."""
        return None if self.steps is None else self.steps * self.step_s / 3600

    def refusals(self) -> Iterator[str]:
        """Yield the reasons why the case cannot run on its GPU."""
        case = self.case
        if case.config.precision.fp8 != "none" and case.gpu.fp8 is None:
            yield f"{case.gpu.name} has no FP8 products, which precision.fp8 {case.config.precision.fp8} asks for"
        if self.needed > case.gpu.memory:
            peak_rank = max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)
            parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in vars(self.memory[peak_rank]).items())
            yield (
                f"does not fit: pipeline rank {peak_rank} needs {self.needed / 1e9:.1f} GB of {case.gpu.name}'s "
                f"{case.gpu.memory / 1e9:.0f} ({parts})"
            )


def rank_memory(case: Case, rank: int) -> Memory:
    """Peak memory of one pipeline rank in the longest step of the run."""
    model, layout, settings = case.config.model, case.layout, case.settings
    chunks, amounts = [case.chunk(stage) for stage in case.stages(rank)], case.largest_micro_batch
    sequences = case.config.train.micro_batch_size
    each = [activations(model, chunk, amounts, settings, sequences=sequences) for chunk in chunks]
    moments = 0 if case.config.optim.offload else case.moments
    sharded = case.config.parallel.distributed_optimizer
    still = model_state_memory(
        model, chunks, settings, data=case.replicas, sharded=sharded, gradient=case.gradient, moments=moments
    )
    return still + Memory(
        activations=peak_in_flight(each, rank=rank, pipeline=layout.pipeline, micro_batches=case.micro_batches),
        logits=logits(model, amounts.head_rows, settings) if chunks[-1].last else 0.0,
        workspace=workspace(model, chunks, amounts, settings),
    )
