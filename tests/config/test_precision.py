"""Precision configuration: sequence length multiples and invalid FP8 combinations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.precision import PrecisionConfig, length_multiple
from megatron_share4v.config.run import RunConfig, RunSection
from megatron_share4v.config.training import TrainConfig


@pytest.mark.parametrize(
    ("fp8", "tensor", "sequence", "context", "other", "multiple"),
    [
        ("none", 1, False, 1, 8, 8),
        ("none", 3, True, 1, 8, 24),
        ("tensorwise", 2, False, 1, 8, 16),
        ("tensorwise", 4, True, 1, 8, 64),
        ("mxfp8", 8, True, 1, 8, 256),  # tensor x 32
        ("blockwise", 2, True, 2, 8, 512),
        ("delayed", 1, False, 2, 24, 96),
    ],
)
def test_length_multiple(fp8: Any, tensor: int, sequence: bool, context: int, other: int, multiple: int) -> None:
    assert (
        length_multiple(PrecisionConfig(fp8=fp8), tensor=tensor, sequence=sequence, context=context, other=other)
        == multiple
    )


def run(
    *,
    pack_length: int | None = None,
    model: ModelConfig = ModelConfig(),
    parallel: dict = {},
    engine: Any = "none",
    **precision: Any,
) -> RunConfig:
    return RunConfig(
        run=RunSection(directory="runs/none"),
        model=model,
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(**precision),
        transformer_engine=engine,
        data=DataConfig(train="data", tokenizer="tokenizer.model", pack_length=pack_length),
        train=TrainConfig(global_batch_size=1),
    )


def test_length_multiple_of_a_run() -> None:
    assert run().length_multiple() == 8
    assert run(fp8="tensorwise", parallel={"tensor": 2, "sequence": True}, pack_length=4096).length_multiple() == 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"fp8": "tensorwise", "pack_length": 4104},
            "data.pack_length 4104 is not divisible by 16, as precision.fp8 tensorwise .* use 4112",
        ),
        (
            {"fp8": "blockwise"},
            "precision.fp8 blockwise is Transformer Engine's; set transformer_engine: language, or use tensorwise",
        ),
        (
            {"fp8": "delayed", "engine": "language", "fp8_first_layers": 1},
            "delayed keeps its scales over the whole model",
        ),
        ({"fp8": "mxfp8", "engine": "language", "dtype": "fp32"}, "needs precision.dtype bf16"),
        ({"fp8": "tensorwise", "engine": "all", "fp8_tower": True}, "an image has 577 positions"),
        (
            {"fp8": "tensorwise", "fp8_first_layers": 16, "fp8_last_layers": 16},
            "leave none of model.language.num_layers 32 in FP8",
        ),
        ({"fp8_tower": True}, "fp8_tower True needs fp8, which is none"),
        ({"guard_every_steps": 100}, "guard_every_steps 100 needs fp8"),
    ],
)
def test_invalid_fp8_configurations(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**wrong)


SO400M = VisionConfig(
    image_size=384, hidden_size=1152, intermediate_size=4304, num_layers=27, num_attention_heads=16, class_token=False,
    feature_select="full",
)  # fmt: skip


def test_fp8_widths_of_a_tower() -> None:
    """4304 is 16 x 269: a tower on two tensor ranks stays in dtype."""
    model = ModelConfig(vision=SO400M)
    run(fp8="tensorwise", fp8_tower=True, model=model)
    run(fp8="tensorwise", model=model, parallel={"tensor": 2})
    message = "model.vision.intermediate_size gives 2152 on each of parallel.tensor 2 ranks"
    with pytest.raises(ValueError, match=message):
        run(fp8="tensorwise", fp8_tower=True, model=model, parallel={"tensor": 2})


def test_transformer_engine_needs_positions_in_multiples_of_8() -> None:
    choice = {"fp8": "tensorwise", "engine": "all", "fp8_tower": True}
    with pytest.raises(ValueError, match="an image has 729 positions"):
        run(model=ModelConfig(vision=SO400M), **choice)
    run(model=ModelConfig(vision=replace(SO400M, image_size=336)), **choice)  # 576 positions


def test_fp8_widths_on_a_tensor_rank() -> None:
    narrow = ModelConfig(
        language=replace(
            LanguageConfig(), hidden_size=96, intermediate_size=176, num_attention_heads=6, num_key_value_heads=6
        )
    )
    run(fp8="tensorwise", model=narrow)
    with pytest.raises(
        ValueError,
        match="multiples of 16; model.language.intermediate_size gives 88 on each of parallel.tensor 2 ranks",
    ):
        run(fp8="tensorwise", model=narrow, parallel={"tensor": 2})


def test_fp8_widths_follow_the_width_of_a_head() -> None:
    """Queries are 4 x 24 = 96 wide, also where the model is wider; the projection has its keys and values too."""
    own = ModelConfig(
        language=replace(
            LanguageConfig(),
            hidden_size=128,
            intermediate_size=192,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
        )
    )
    run(fp8="tensorwise", model=own)
    odd = replace(own, language=replace(own.language, head_dim=20))
    run(fp8="tensorwise", model=odd)  # 160 and 80
    with pytest.raises(ValueError, match="model.language.num_attention_heads gives 40 on each of parallel.tensor 2"):
        run(fp8="tensorwise", model=odd, parallel={"tensor": 2})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"tensor": 6},
            "model.language.num_key_value_heads 4 and parallel.tensor 6 do not divide each other: .* "
            "set parallel.tensor to a divisor or a multiple of 4",
        ),
        (
            {"tensor": 2, "context": 3},
            "the 2 model.language.num_key_value_heads of a tensor rank and parallel.context 3 do not divide each "
            "other; set parallel.context to a divisor or a multiple of 2",
        ),
    ],
)
def test_key_value_heads_that_ranks_cannot_share(parallel: dict, message: str) -> None:
    language = replace(
        LanguageConfig(), hidden_size=768, intermediate_size=768, num_attention_heads=24, num_key_value_heads=4
    )
    with pytest.raises(ValueError, match=message):
        run(model=ModelConfig(language=language), parallel=parallel)
