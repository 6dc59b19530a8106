"""Predictions against hand arithmetic, published speeds and parameter counts, and the trainer's checks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.planner.case import Assumptions, Case
from megatron_share4v.planner.cost import (
    context_bytes,
    data_bandwidth,
    data_bytes,
    embedding_bytes,
    tensor_bytes,
    traffic,
)
from megatron_share4v.planner.gpus import GPUS
from megatron_share4v.planner.memory import Chunk, _projector, _tower, head_columns, make_chunk, weight_shapes
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.report import format_report, prediction_to_json
from megatron_share4v.planner.search import SearchResult, search
from megatron_share4v.planner.workload import Workload, assumed_workload

RECIPE = "examples/share4v_7b/pretrain.yaml"


@pytest.fixture(scope="module")
def config(repository: Path) -> RunConfig:
    return load_run(repository / RECIPE)


def case(config: RunConfig, world_size: int = 16, *, gpu: str = "h200", micro_batch: int = 16, **parallel) -> Case:
    changed = replace(
        config, parallel=replace(config.parallel, **parallel), train=replace(config.train, micro_batch_size=micro_batch)
    )
    return Case.of(changed, world_size=world_size, workload=assumed_workload(config, samples=1_246_000), gpu=GPUS[gpu])


def test_weight_counts_match_published_models(config: RunConfig) -> None:
    whole = Chunk(layers=32, first=True, last=True)
    total = sum(elements * count for elements, count, _ in weight_shapes(config.model, whole, tensor=1))
    assert total == 6_738_415_616 + 20_979_712 + 303_507_456 - 12_596_224 - 2 * 1024
    split = sum(elements * count for elements, count, _ in weight_shapes(config.model, whole, tensor=8))
    assert total / 8 < split < total / 8 * 1.01, (
        "norms, biases behind rows and the tower's embeddings are on every rank"
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama_3.2_1b", 1_235_814_400),
        ("qwen2.5_0.5b", 494_032_768),
        ("qwen2.5_7b", 7_615_616_512),
        ("qwen3_0.6b", 596_049_920),
        ("qwen3_8b", 8_190_735_360),
    ],
)
def test_weight_counts_of_language_families(name: str, published: int, repository: Path) -> None:
    """Tied heads count once, on one stage; on two, the last has a copy. Norms and biases are counted."""
    model = load_run(repository / RECIPE, [f"model.language={name}"]).model
    language, others = model.language, (*_tower(model, 1), *_projector(model, 1))
    counts = (language.num_layers // 2, language.num_layers - language.num_layers // 2)
    one, two = (
        sum(
            elements * count
            for stage in range(len(stages))
            for elements, count, _ in weight_shapes(model, make_chunk(stage, stages), tensor=1)
        )
        for stages in ((language.num_layers,), counts)
    )
    assert one - sum(elements * count for elements, count, _ in others) == published
    assert two - one == language.tie_word_embeddings * language.vocab_size * language.hidden_size


def test_tied_copy_is_reduced_between_the_ends(repository: Path) -> None:
    """fp32 gradients of half the embedding on each of two tensor ranks, once per step."""
    config = load_run(repository / RECIPE, ["model.language=qwen2.5_0.5b"])
    model = config.model
    tied, untied = (
        case(
            replace(config, model=replace(model, language=replace(model.language, tie_word_embeddings=tie))),
            16,
            tensor=2,
            pipeline=4,
        )
        for tie in (True, False)
    )
    each = 4 * 151_936 // 2 * 896
    assert [embedding_bytes(tied, rank) for rank in range(4)] == [each, 0, 0, each]
    assert not any(embedding_bytes(untied, rank) for rank in range(4))
    assert Prediction(tied).after_s > Prediction(untied).after_s


def test_memory_shrinks_where_the_layout_says(config: RunConfig) -> None:
    one, sharded = (Prediction(case(config, world_size, tensor=2, pipeline=1)).memory[0] for world_size in (2, 16))
    assert sharded.optimizer == pytest.approx(one.optimizer / 8, rel=1e-3) and sharded.weights == pytest.approx(
        one.weights, rel=1e-3
    )
    assert one.weights + one.gradients + one.optimizer == pytest.approx(
        6_898e6 / 2 * (2 + 4 + 12) + 152e6 / 2 * 2, rel=0.01
    )
    shallow, deep = (Prediction(case(config, tensor=2, pipeline=depth)).memory for depth in (1, 4))
    assert sum(memory.weights for memory in deep) == pytest.approx(shallow[0].weights, rel=1e-3)
    assert [memory.activations for memory in deep] == sorted((memory.activations for memory in deep), reverse=True)


def text_model(config: RunConfig, **sections) -> Prediction:
    """Prediction for Llama 3 8B shapes with 8,192 positions on 8 H100."""
    language = replace(
        config.model.language,
        vocab_size=128_256,
        intermediate_size=14_336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    changed = replace(
        config,
        model=replace(config.model, language=language),
        train=replace(config.train, global_batch_size=128, micro_batch_size=1),
        parallel=replace(config.parallel, tensor=1, sequence=False),
        **sections,
    )
    workload = Workload(
        length=8192,
        longest=8192,
        positions=8192,
        squares=8192**2,
        padded_squares=8192**2,
        images=0,
        head_rows=8192,
        sequences=None,
        source="text",
    )
    return Prediction(Case.of(changed, world_size=8, workload=workload, gpu=GPUS["h100"]))


def test_8b_text_model_matches_published_speed(config: RunConfig) -> None:
    """Default efficiencies reproduce 47 % MFU in BF16 (Megatron-LM README) and a 1.28x speedup in FP8 (torchtitan)."""
    plan = text_model(config)
    assert 0.46 < plan.mfu < 0.48 and plan.hours is None


def test_fp8_prediction_and_peak(config: RunConfig) -> None:
    """FP8 by native ops and by Transformer Engine (two copies of each weight); refused on GPUs without FP8."""
    tensorwise = replace(config.precision, fp8="tensorwise")
    plain, native = text_model(config), text_model(config, precision=tensorwise)
    engine = text_model(config, precision=tensorwise, transformer_engine="language")
    blocks = text_model(config, precision=replace(tensorwise, fp8="blockwise"), transformer_engine="language")
    precise = text_model(config, precision=replace(tensorwise, fp8_weight_gradient="dtype"))
    some = text_model(config, precision=replace(tensorwise, fp8_first_layers=8, fp8_last_layers=8))
    assert 1.26 < plain.step_s / native.step_s < 1.30 < plain.step_s / engine.step_s and engine.model_tflops < 744
    assert plain.step_s > some.step_s > native.step_s and plain.step_s > precise.step_s > native.step_s
    settings = [plan.memory[0].activations for plan in (plain, precise, some, blocks, native)]
    # Inputs take 1 byte instead of 2; the attention kernel saves its output, so the FP8 copy is additional.
    each = 32 * 8192 * (4096 + 4096 - 4096 + 14_336)
    assert (
        settings == sorted(settings, reverse=True)
        and settings[0] - settings[-1] == pytest.approx(each, rel=1e-6)
        and settings[0] == settings[1]
    )
    weights = 32 * 218_103_808  # weights of a layer's matrices
    assert engine.memory[0].weights - native.memory[0].weights == pytest.approx(2 * weights, rel=1e-6)
    assert plain.utilisation == f"MFU {plain.mfu:.1%}" and plain.fp8_mfu is None
    assert native.utilisation == f"MFU {native.mfu:.1%} of the BF16 peak, {native.mfu * 989 / 1979:.1%} of the FP8 peak"
    assert (
        "Transformer Engine (from the source" in format_report(engine, [], SearchResult([], Counter(), 0), title="")
        and prediction_to_json(native)["mfu_is_of"] == "bf16"
    )
    old = Prediction(replace(native.case, gpu=GPUS["a100"]))
    assert "A100 has no FP8 products, which precision.fp8 tensorwise asks for" in list(old.refusals())


def test_ring_collective_traffic(config: RunConfig) -> None:
    plain, sequence = (case(config, 16, tensor=2, sequence=sequence) for sequence in (False, True))
    message, layer = 16 * 976 * 4096 * 2, Chunk(layers=1, first=False, last=False)
    assert tensor_bytes(plain, layer, True) == (2 * message, 2) and tensor_bytes(plain, layer, False) == (
        2 * message,
        2,
    )
    assert tensor_bytes(sequence, layer, True) == (2 * message, 4) and tensor_bytes(sequence, layer, False) == (
        3 * message,
        6,
    )
    assert data_bytes(sequence, 1000) == (1000 * 4 * 7 / 8, 1000 * 2 * 7 / 8)
    assert data_bytes(case(config, 16, tensor=2, distributed_optimizer=False), 1000) == (1000 * 8 * 7 / 8, 0)
    assert traffic(case(config, 1, tensor=1, sequence=False)) == type(traffic(plain))(0, 0, 0, 0)
    deep = case(config, 16, tensor=2, pipeline=4)
    assert traffic(deep).pipeline == 2 * 16 * 976 * 4096 * 2 / 2 * deep.micro_batches, (
        "a middle stage sends on and back, each half a sequence"
    )


def test_context_parallel_memory_and_traffic(config: RunConfig) -> None:
    long = replace(
        config,
        data=replace(config.data, pack_length=65_536, pad_to="step"),
        train=replace(config.train, global_batch_size=8, micro_batch_size=1),
    )
    one, four = (case(long, 8, micro_batch=1, tensor=1, sequence=False, context=context) for context in (1, 4))
    layer = Chunk(layers=1, first=False, last=False)
    # All-to-all of queries, keys, values and output for 16,384 positions: three of four parts are sent.
    assert context_bytes(four, layer) == (16_384 * 4 * 4096 * 2 * 3 / 4, 2) and context_bytes(one, layer) == (0.0, 0)
    assert (
        traffic(four).context == 32 * 2 * context_bytes(four, layer)[0] * four.micro_batches
        and traffic(one).context == 0
    )
    assert (
        four.layout.data == 2 and four.replicas == one.replicas == 8 and data_bytes(four, 1000) == data_bytes(one, 1000)
    )
    apart, together = Prediction(one).memory[0], Prediction(four).memory[0]
    assert 0.25 < together.activations / apart.activations < 0.3, "a quarter, and attention's result once more"
    assert (together.weights, together.optimizer) == (apart.weights, apart.optimizer)
    work = Prediction(one).loads[0] / Prediction(four).loads[0]
    assert 3.5 < work < 4, "a quarter of the work, and the exchange"


def test_data_parallel_ring_bandwidth(config: RunConfig) -> None:
    assert data_bandwidth(case(config, 8, tensor=1, sequence=False, pipeline=1)) == GPUS["h200"].link
    assert data_bandwidth(case(config, 16, tensor=1, sequence=False)) == 400e9
    assert data_bandwidth(case(config, 16, tensor=8)) == 50e9


def test_trainer_checks_are_applied(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="world size 15 is not a multiple of parallel.tensor 2"):
        case(config, 15)
    with pytest.raises(
        ConfigError,
        match="train.global_batch_size 256 is not a multiple of train.micro_batch_size 16 x data-parallel size 24",
    ):
        case(config, 48)
    with pytest.raises(ConfigError, match="multiple of parallel.pipeline"):
        case(config, 48, pipeline=3, virtual=2)


def test_options_of_memory_and_overlap_are_counted(config: RunConfig) -> None:
    """Each option changes memory, traffic or hidden communication as documented."""

    def changed(section: str, **values) -> Prediction:
        base = case(config, 16, tensor=2)
        return Prediction(
            replace(base, config=replace(base.config, **{section: replace(getattr(base.config, section), **values)}))
        )

    plain, short, averages = (
        Prediction(case(config, 16, tensor=2)),
        changed("precision", gradients="bf16"),
        changed("optim", moments="bf16"),
    )
    assert short.memory[0].gradients == plain.memory[0].gradients / 2 and short.traffic.data == pytest.approx(
        plain.traffic.data * 4 / 6
    )
    assert averages.memory[0].optimizer == pytest.approx(plain.memory[0].optimizer * 8 / 12)
    away = changed("optim", offload=True)
    assert (
        away.memory[0].optimizer == pytest.approx(plain.memory[0].optimizer * 4 / 12) and away.after_s > plain.after_s
    )
    assert changed("parallel", overlap_param_gather=True).after_s < plain.after_s
    again = changed("train", recompute="full")
    assert (
        again.memory[0].activations < plain.memory[0].activations / 9
        and 1.2 < again.pipeline_s / plain.pipeline_s < 1.4
    )
    assert again.mfu < plain.mfu and again.hfu > 0.95 * plain.hfu
    by_hand = case(config, 16, tensor=2, pipeline=2, layout=(10, 22))
    assert (
        by_hand.counts == (10, 22)
        and Prediction(by_hand).imbalance > Prediction(case(config, 16, tensor=2, pipeline=2)).imbalance
    )


def test_micro_batch_padding_is_shorter(repository: Path) -> None:
    lengths = [
        assumed_workload(load_run(repository / RECIPE, [f"data.pad_to={whose}"])).length
        for whose in ("step", "micro_batch")
    ]
    assert lengths == [976, 896]


def test_memory_refusal_lists_classes(config: RunConfig) -> None:
    [reason] = Prediction(case(config, 16, gpu="a100", tensor=1, sequence=False)).refusals()
    assert (
        reason.startswith("does not fit: pipeline rank 0 needs ")
        and "A100's 85 (weights 14.1, gradients 27.6" in reason
    )
    assert not list(Prediction(case(config, 16)).refusals())


@pytest.mark.parametrize(("world_size", "overrides"), [(16, ()), (64, ("loss.normalize=tokens",))])
def test_search_finds_the_fastest(repository: Path, world_size: int, overrides: tuple[str, ...]) -> None:
    """The pruned search equals exhaustive simulation, and its lower bound holds for every candidate."""
    config = load_run(repository / RECIPE, overrides)
    setting = dict(
        world_size=world_size,
        workload=assumed_workload(config, samples=1000),
        gpu=GPUS["h200"],
        assumptions=Assumptions(),
    )
    few, every = search(config, **setting, keep=4), search(config, **setting, keep=10_000)
    assert len(every.best) + sum(every.refused.values()) == every.tried and len(few.best) == 4
    assert [plan.step_s for plan in few.best] == [plan.step_s for plan in every.best[:4]]
    assert all(plan.least_step_s <= plan.step_s * (1 + 1e-9) for plan in every.best)
    sizes = {plan.case.config.train.micro_batch_size for plan in every.best}
    assert sizes == {16} if not overrides else len(sizes) > 3, (
        "the official averaging makes the micro-batch size part of the recipe"
    )


def test_step_time_is_consistent(config: RunConfig) -> None:
    plan = Prediction(case(config, 16, tensor=2, pipeline=2, virtual=2))
    busy = sum(plan.loads) / 2 * plan.case.micro_batches
    assert plan.pipeline_s == pytest.approx(busy / (1 - plan.bubble)) and plan.step_s > plan.pipeline_s
    assert plan.mfu < plan.hfu < plan.case.assumptions.matrices
    assert plan.hours == pytest.approx(4868 * plan.step_s / 3600)
    slower = replace(plan.case.config, parallel=replace(plan.case.config.parallel, overlap_grad_reduce=False))
    assert Prediction(replace(plan.case, config=slower)).after_s > plan.after_s


def test_logit_blocks_match_the_op(config: RunConfig) -> None:
    from megatron_share4v.ops.linear_cross_entropy import _block_columns

    for rows in (0, 1, 200, 3200, 50_000):
        for columns in (4000, 16_000, 32_000, 128_256):
            for ops in ("native", "reference"):
                assert head_columns(rows, columns, native=ops == "native") == _block_columns(rows, columns, ops)
