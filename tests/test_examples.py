"""Every YAML under examples/ loads, and the recipes match the papers and the official scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_share4v.config.load import dump, load, load_run
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.train.lr_schedule import warmup_steps

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CLASSES = {"models": ModelConfig}  # folders without training runs
FILES = sorted(EXAMPLES.rglob("*.yaml"))

GPUS = 16
# global and micro batch, learning rate, samples, steps, warm-up steps (rounded up, as the official trainer does)
RECIPES = {
    "share4v_7b/pretrain": (256, 16, 2e-5, 1_246_000, 4868, 147),
    "share4v_7b/finetune": (128, 8, 2e-5, 665_298, 5198, 156),
    "share4v_13b/pretrain": (256, 16, 2e-5, 1_246_000, 4868, 147),
    "share4v_13b/finetune": (128, 8, 2e-5, 665_298, 5198, 156),
    "llava15_7b/pretrain": (256, 32, 1e-3, 558_000, 2180, 66),
    "llava15_7b/finetune": (128, 16, 2e-5, 665_298, 5198, 156),
}


def recipe(name: str) -> RunConfig:
    return load_run(EXAMPLES / f"{name}.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    cls = CLASSES.get(path.relative_to(EXAMPLES).parts[0], RunConfig)
    config = load(cls, path)
    (tmp_path / "resolved.yaml").write_text(dump(config), encoding="utf-8")
    assert load(cls, tmp_path / "resolved.yaml") == config


def test_recipe_table_is_complete() -> None:
    found = {
        path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in FILES if path.stem in ("pretrain", "finetune")
    }
    assert set(RECIPES) == found - {"quickstart/pretrain", "quickstart/finetune"}


@pytest.mark.parametrize("name", RECIPES)
def test_batch_rate_and_length_of_each_recipe(name: str) -> None:
    config, (batch, micro_batch, rate, samples, steps, warmup) = recipe(name), RECIPES[name]
    assert (config.train.global_batch_size, config.train.micro_batch_size, config.optim.learning_rate) == (
        batch,
        micro_batch,
        rate,
    )
    assert config.train.total_steps(samples) == steps
    assert warmup_steps(config.schedule, total_steps=steps) == warmup
    data_parallel = GPUS // (config.parallel.tensor * config.parallel.pipeline)
    assert batch % (micro_batch * data_parallel) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_settings_common_to_all_recipes(name: str) -> None:
    config = recipe(name)
    optim, schedule = config.optim, config.schedule
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_grad_norm) == (
        0.9,
        0.999,
        1e-8,
        0.0,
        0.0,
    )
    assert (optim.projector_learning_rate, optim.vision_learning_rate) == (None, None)
    assert (schedule.kind, schedule.warmup_ratio, schedule.warmup_steps, schedule.final_ratio) == (
        "cosine",
        0.03,
        None,
        0.0,
    )
    assert (config.precision.dtype, config.loss.normalize, config.train.epochs) == ("bf16", "microbatch", 1.0)
    assert (config.data.max_text_length, config.run.seed) == (2048, 42)
    assert config.model.vision.num_patches == 576
    assert config.run.directory == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_settings_of_each_stage(name: str) -> None:
    family, stage = name.split("/")
    config = recipe(name)
    data, trainable = config.data, config.model.trainable
    if stage == "pretrain":
        assert (data.template, data.image_aspect_ratio, data.order) == ("plain", "square", "random")
        assert (trainable.language, trainable.vision_from_block) == (
            (False, None) if family == "llava15_7b" else (True, 12)
        )
    else:
        assert (data.template, data.image_aspect_ratio, data.order) == ("vicuna_v1", "pad", "group_by_modality_length")
        assert (trainable.language, trainable.vision_from_block) == (True, None)
        assert config.checkpoint.initialize_from == f"{recipe(f'{family}/pretrain').run.directory}/checkpoints/latest"
    assert trainable.projector


@pytest.mark.parametrize(("size", "million"), [("7b", 6738), ("13b", 13016)])
def test_language_parameters_of_the_presets(size: str, million: int) -> None:
    language = load(ModelConfig, EXAMPLES / f"models/share4v_{size}.yaml").language
    width, rows = language.hidden_size, language.vocab_size
    block = 4 * width**2 + 3 * width * language.intermediate_size + 2 * width
    assert round((language.num_layers * block + 2 * rows * width + width) / 1e6) == million
    assert language.padded_vocab_size == rows


def test_presets_differ_only_in_the_language_model() -> None:
    small, large = (load(ModelConfig, EXAMPLES / f"models/share4v_{size}.yaml") for size in ("7b", "13b"))
    assert small == ModelConfig(), "the defaults are the 7B model"
    assert large.vision == small.vision and large.projector == small.projector
    assert (large.language.rms_norm_eps, large.language.max_position_embeddings) == (1e-5, 4096)


def test_tiny_is_tiny() -> None:
    tiny = load(ModelConfig, EXAMPLES / "models/tiny.yaml")
    assert 32 <= tiny.vision.image_size <= 64 and tiny.vision.num_built_layers == 3 and tiny.language.num_layers <= 4
