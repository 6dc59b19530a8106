"""A run on one layout: the input of a prediction, checked as the trainer checks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from megatron_share4v.config.run import RunConfig
from megatron_share4v.model.flops import ExecutionOptions, FlopsByPart, WorkloadCounts, flops_by_part
from megatron_share4v.model.pipeline_split import layers_per_stage
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.planner.gpus import Gpu
from megatron_share4v.planner.memory import Chunk, Fp8Settings, MemorySettings, RecomputeSettings, make_chunk
from megatron_share4v.planner.workload import Workload

CODE_SCALES = {"blockwise": 4 / 128, "mxfp8": 1 / 32}
"""Bytes of scale per 8-bit value: one fp32 for 128 values, or one byte for 32; the other recipes have one scale per
tensor.
"""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Efficiencies and overheads that no configuration contains.

    Fractions are relative to the GPU's data sheet (gpus.py).
    """

    matrices: float = 0.62
    """Fraction of the BF16 peak in matrix products with weights.

    A large product alone reached 0.80 on an H200; in a step products are smaller and share the power. With this value a
    text model of 8 B comes to the 47 % MFU that Megatron-LM publishes for H100.
    """
    fp8: float = 0.57
    """Fraction of the FP8 peak in FP8 products, for all recipes.

    With this value our FP8 layers make an 8 B text model 1.28 times as fast as BF16, the speed-up that torchtitan
    publishes on H100. Megatron-Bridge publishes 744 TFLOP/s with Transformer Engine, which is more than this predicts.
    """
    attention: float = 0.35
    """Fraction of the BF16 peak in attention kernels."""
    memory: float = 0.80
    """Fraction of the memory bandwidth in everything between matrix products."""
    links: float = 0.75
    """Fraction of a link's bandwidth in collectives."""
    host: float = 40e9
    """Bandwidth between GPU and host memory in each direction, bytes/s."""
    collective_s: float = 15e-6
    """Latency of a collective, seconds."""
    layer_s: float = 1e-4
    """Minimum time of a layer's forward pass, seconds, limited by kernel launches; the backward pass takes twice as
    long.
    """
    step_s: float = 0.02
    """Host time per step for reading the loss, the gradient norm and the clock, seconds."""
    reserve: float = 3e9
    """Memory of CUDA, NCCL and cuBLAS, bytes."""
    fragments: float = 0.05
    """Fraction of the allocated memory lost to fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration placed on a world size, with the workload and the GPU."""

    config: RunConfig
    layout: Layout
    micro_batches: int
    """Micro-batches per DP rank in a step."""
    workload: Workload
    gpu: Gpu
    assumptions: Assumptions = field(default_factory=Assumptions)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        *,
        world_size: int,
        workload: Workload,
        gpu: Gpu,
        assumptions: Assumptions = Assumptions(),
    ) -> Case:
        """Build the layout for a world size.

        Raises ConfigError, as the trainer does, when world size or batch do not divide.
        """
        layout = Layout.for_world(config.parallel, world_size=world_size)
        train = config.train
        count = layout.check_micro_batches(
            global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size
        )
        return cls(
            config=config, layout=layout, micro_batches=count, workload=workload, gpu=gpu, assumptions=assumptions
        )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Decoder layers of each pipeline stage."""
        return layers_per_stage(self.config.model, self.config.parallel)

    def chunk(self, stage: int) -> Chunk:
        """Contents of a pipeline stage."""
        return make_chunk(
            stage, self.counts, fp8=self.config.precision.fp8_layers(self.config.model.language.num_layers)
        )

    def stages(self, rank: int) -> range:
        """Stages of a pipeline rank."""
        return range(rank, len(self.counts), self.layout.pipeline)

    @cached_property
    def settings(self) -> MemorySettings:
        """Settings that determine the memory of a rank."""
        config, train = self.config, self.config.train
        return MemorySettings(
            tensor=self.layout.tensor,
            context=self.layout.context,
            sequence=config.parallel.sequence,
            element=2 if config.precision.dtype == "bf16" else 4,
            native=config.ops != "reference",
            recompute=RecomputeSettings(
                train.recompute, train.recompute_layers, train.recompute_tower, train.recompute_modules
            ),
            fp8=self._fp8_kept,
        )

    @property
    def _fp8_kept(self) -> Fp8Settings:
        precision = self.config.precision
        return Fp8Settings(
            engine=self.config.transformer_engine != "none",
            code=1.0 + CODE_SCALES.get(precision.fp8, 0.0),
            precise=precision.fp8_weight_gradient == "dtype",
            tower=precision.fp8_tower,
        )

    @cached_property
    def work(self) -> FlopsByPart:
        """FLOPs of a micro-batch by part of the model."""
        return flops_by_part(self.config.model, self.micro_batch, self.execution)

    @cached_property
    def micro_batch(self) -> WorkloadCounts:
        """Average amounts in one rank's share of a micro-batch, padding included."""
        return self._part(self.workload.done(self.config.train.micro_batch_size))

    def _part(self, whole: WorkloadCounts) -> WorkloadCounts:
        """Amounts on the CP rank that has most of them. Images are spread over a pack, but come first in a sample."""
        ranks = self.layout.context
        return WorkloadCounts(
            positions=whole.positions / ranks,
            squares=whole.squares / ranks,
            images=whole.images / (ranks if self.config.data.pack_length else 1),
            head_rows=whole.head_rows / ranks,
        )

    @property
    def gradient(self) -> int:
        """Bytes per gradient in the gradient buffer."""
        return 2 if self.config.precision.gradients == "bf16" else 4

    @property
    def moments(self) -> int:
        """Bytes of AdamW's two moments of a weight, on the GPU or offloaded."""
        return 4 if self.config.optim.moments == "bf16" else 8

    @property
    def largest_micro_batch(self) -> WorkloadCounts:
        """Amounts in one rank's share of a micro-batch of the longest step."""
        count, usual = self.config.train.micro_batch_size, self.workload
        return self._part(
            WorkloadCounts(
                positions=usual.longest * count,
                squares=float(usual.longest) ** 2 * count,
                images=usual.images * count,
                head_rows=usual.head_rows * count * usual.longest / usual.length,
            )
        )

    @property
    def replicas(self) -> int:
        """Ranks with the same weights: DP x CP."""
        return self.layout.data * self.layout.context

    @property
    def execution(self) -> ExecutionOptions:
        """Recomputation and padding that hardware FLOPs count."""
        return ExecutionOptions.of(self.config, layers_per_stage=self.counts)
