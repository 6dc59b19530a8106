"""One run on one layout, as values: what is predicted. Making one is making the trainer's own checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from megatron_share4v.config.run import RunConfig
from megatron_share4v.model.flops import ExecutionOptions, FlopsByPart, WorkloadCounts, flops_by_part
from megatron_share4v.model.pipeline_split import layers_per_stage
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.planner.gpus import Gpu
from megatron_share4v.planner.memory import Chunk, Fp8Kept, Kept, Recomputed, chunk_of
from megatron_share4v.planner.workload import Workload

CODE_SCALES = {"blockwise": 4 / 128, "mxfp8": 1 / 32}
"""Bytes of scale for each 8-bit value: one fp32 for 128 of them, or one byte for 32; the other recipes have one scale for all."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no configuration says. Shares are of the GPU's data sheet (gpus.py)."""

    matrices: float = 0.62
    """Of the peak, in products with weights. A large one alone was measured at 0.80 of an H200's; in a step they are smaller and share the power.
    With this value a text model of 8 B comes to the 47 % MFU that Megatron-LM publishes for H100."""
    fp8: float = 0.57
    """Of the FP8 peak, in FP8 products, by all recipes. With this value our own layers make a text model of 8 B 1.28 times as fast as in BF16, which
    torchtitan publishes of such layers on H100. Megatron-Bridge publishes 744 TFLOP/s with Transformer Engine, more than this comes to."""
    attention: float = 0.35
    """Of the peak, in attention kernels."""
    memory: float = 0.80
    """Of the memory's bandwidth, in everything between the products."""
    links: float = 0.75
    """Of a link, in collectives."""
    host: float = 40e9
    """Bytes/s between a GPU and its host's memory, each way."""
    collective_s: float = 15e-6
    """What a collective takes beside its bytes."""
    layer_s: float = 1e-4
    """What the forward pass of a layer takes at least, as the host must launch its kernels; twice that backward."""
    step_s: float = 0.02
    """Of each step, for reading the loss, the norm and the clock."""
    reserve: float = 3e9
    """Bytes of CUDA, NCCL and cuBLAS."""
    fragments: float = 0.05
    """Of what is allocated, lost between allocations."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration whose `parallel` and `train` have been put at a world of some size."""

    config: RunConfig
    layout: Layout
    micro_batches: int
    """Of each data-parallel rank in a step."""
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
        """Raises ConfigError, as the trainer does, when world size or batch do not divide."""
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
        """Decoder layers of each stage."""
        return layers_per_stage(self.config.model, self.config.parallel)

    def chunk(self, stage: int) -> Chunk:
        """What a stage holds."""
        return chunk_of(stage, self.counts, fp8=self.config.precision.fp8_layers(self.config.model.language.num_layers))

    def stages(self, rank: int) -> range:
        """Of a pipeline rank."""
        return range(rank, len(self.counts), self.layout.pipeline)

    @cached_property
    def kept(self) -> Kept:
        """How ranks hold things."""
        config, train = self.config, self.config.train
        return Kept(
            tensor=self.layout.tensor,
            context=self.layout.context,
            sequence=config.parallel.sequence,
            element=2 if config.precision.dtype == "bf16" else 4,
            native=config.ops != "reference",
            recompute=Recomputed(
                train.recompute, train.recompute_layers, train.recompute_tower, train.recompute_modules
            ),
            fp8=self._fp8_kept,
        )

    @property
    def _fp8_kept(self) -> Fp8Kept:
        precision = self.config.precision
        return Fp8Kept(
            engine=self.config.transformer_engine != "none",
            code=1.0 + CODE_SCALES.get(precision.fp8, 0.0),
            precise=precision.fp8_weight_gradient == "dtype",
            tower=precision.fp8_tower,
        )

    @cached_property
    def work(self) -> FlopsByPart:
        """FLOPs of a micro-batch."""
        return flops_by_part(self.config.model, self.micro_batch, self.execution)

    @cached_property
    def micro_batch(self) -> WorkloadCounts:
        """What a micro-batch is made of on average, padding included: of it, what one rank has (`_part`)."""
        return self._part(self.workload.done(self.config.train.micro_batch_size))

    def _part(self, whole: WorkloadCounts) -> WorkloadCounts:
        """Of the context-parallel rank that has most. Images lie everywhere in a pack, but at the beginning of a sample."""
        ranks = self.layout.context
        return WorkloadCounts(
            positions=whole.positions / ranks,
            squares=whole.squares / ranks,
            images=whole.images / (ranks if self.config.data.pack_length else 1),
            head_rows=whole.head_rows / ranks,
        )

    @property
    def gradient(self) -> int:
        """Bytes of a gradient in its buffer."""
        return 2 if self.config.precision.gradients == "bf16" else 4

    @property
    def moments(self) -> int:
        """Bytes of AdamW's two averages of a weight, wherever they are."""
        return 4 if self.config.optim.moments == "bf16" else 8

    @property
    def largest_micro_batch(self) -> WorkloadCounts:
        """Of the longest step."""
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
        """Ranks that hold the same weights."""
        return self.layout.data * self.layout.context

    @property
    def execution(self) -> ExecutionOptions:
        """What the machine computes twice."""
        return ExecutionOptions.of(self.config, fused_head=self.kept.native, layers_per_stage=self.counts)
