"""Every YAML under examples/ loads, and the recipes match the papers and the official scripts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_share4v.config.load import dump, load, load_run
from megatron_share4v.config.locate import Reader
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.train.lr_schedule import warmup_steps

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRESETS = {"vision": VisionConfig, "language": LanguageConfig}
CLASSES = {"models": ModelConfig, **{f"models/{kind}": cls for kind, cls in PRESETS.items()}}  # no training runs
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
    cls = CLASSES.get(path.parent.relative_to(EXAMPLES).as_posix(), RunConfig)
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


# Parameters of the published checkpoints, a tied matrix counted once: totals of their safetensors files, except where
# a file repeats the tied matrix (Qwen3-1.7B) or holds more than the model (Vicuna: the model's own count).
LANGUAGE_MODELS = {
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "llama_3_8b": 8_030_261_248,
    "llama_3.1_8b": 8_030_261_248,
    "llama_3.2_1b": 1_235_814_400,
    "llama_3.2_3b": 3_212_749_824,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "mistral_7b": 7_241_732_096,
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_sizes_of_the_language_models(name: str) -> None:
    model = load(LanguageConfig, EXAMPLES / f"models/language/{name}.yaml")
    assert parameters(model) == LANGUAGE_MODELS[name]
    assert model.padded_vocab_size == model.vocab_size, "published tables have rows of a multiple of 64"
    assert f"{LANGUAGE_MODELS[name]:,} parameters" in (EXAMPLES / f"models/language/{name}.yaml").read_text("utf-8")


def parameters(model: LanguageConfig) -> int:
    """Number of parameters by the layers' formulas."""
    width, head = model.hidden_size, model.attention_head_dim
    queries, keys = head * model.num_attention_heads, head * model.num_key_value_heads
    attention = width * (2 * queries + 2 * keys) + model.qkv_bias * (queries + 2 * keys) + model.qk_norm * 2 * head
    block = attention + 3 * width * model.intermediate_size + 2 * width
    tables = 1 if model.tie_word_embeddings else 2
    return tables * model.vocab_size * width + model.num_layers * block + width


def test_every_language_model_has_a_published_size() -> None:
    assert set(LANGUAGE_MODELS) == {path.stem for path in (EXAMPLES / "models/language").glob("*.yaml")}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in PRESETS], ids=lambda path: path.stem)
def test_presets_state_every_field(path: Path) -> None:
    stated = set(Reader().read_file(path).entries)
    assert stated == {field.name for field in dataclasses.fields(PRESETS[path.parent.name])}


@pytest.mark.parametrize(
    ("name", "positions"),
    [("clip_l_336", 576), ("siglip_so400m_384", 729), ("siglip2_so400m_384", 729), ("dinov2_l", 1369)],
)
def test_positions_of_the_towers(name: str, positions: int) -> None:
    tower = load(VisionConfig, EXAMPLES / f"models/vision/{name}.yaml")
    assert (tower.num_features, tower.num_built_layers) == (positions, tower.num_layers - 1)


def test_presets_differ_only_in_the_language_model() -> None:
    small, large = (load(ModelConfig, EXAMPLES / f"models/share4v_{size}.yaml") for size in ("7b", "13b"))
    assert small == ModelConfig(), "the defaults are the 7B model"
    assert large.vision == small.vision and large.projector == small.projector
    assert (large.language.rms_norm_eps, large.language.max_position_embeddings) == (1e-5, 4096)


def test_tiny_is_tiny() -> None:
    tiny = load(ModelConfig, EXAMPLES / "models/tiny.yaml")
    assert 32 <= tiny.vision.image_size <= 64 and tiny.vision.num_built_layers == 3 and tiny.language.num_layers <= 4
