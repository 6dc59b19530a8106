"""Every YAML under examples/ loads, and the recipes match the papers and the official scripts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_share4v.config.load import dump, flat, load, load_run
from megatron_share4v.config.locate import Reader
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.planner import gpus
from megatron_share4v.planner.case import Assumptions, Case
from megatron_share4v.planner.predict import Prediction
from megatron_share4v.planner.workload import assumed_workload
from megatron_share4v.train.lr_schedule import warmup_steps

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRESETS = {"vision": VisionConfig, "language": LanguageConfig}
CLASSES = {"models": ModelConfig, **{f"models/{kind}": cls for kind, cls in PRESETS.items()}}  # no training runs
FILES = sorted(EXAMPLES.rglob("*.yaml"))

GPUS = 16  # A100 with 80 GB, where MACHINES names no others
MACHINES = {"qwen2.5_1.5b_siglip": (1, "l40s")}
# global and micro batch, learning rate, samples, steps, warm-up steps (rounded up, as the official trainer does)
RECIPES = {
    "share4v_7b/pretrain": (256, 16, 2e-5, 1_246_000, 4868, 147),
    "share4v_7b/finetune": (128, 8, 2e-5, 665_298, 5198, 156),
    "share4v_13b/pretrain": (256, 16, 2e-5, 1_246_000, 4868, 147),
    "share4v_13b/finetune": (128, 8, 2e-5, 665_298, 5198, 156),
    "llava15_7b/pretrain": (256, 32, 1e-3, 558_000, 2180, 66),
    "llava15_7b/finetune": (128, 16, 2e-5, 665_298, 5198, 156),
    "llama_3_8b_clip/pretrain": (256, 8, 2e-5, 1_246_000, 4868, 147),
    "llama_3_8b_clip/finetune": (128, 4, 2e-5, 665_298, 5198, 156),
    "qwen2.5_7b_siglip/pretrain": (256, 8, 1e-5, 1_246_000, 4868, 147),
    "qwen2.5_7b_siglip/finetune": (128, 4, 1e-5, 665_298, 5198, 156),
    "qwen2.5_1.5b_siglip/pretrain": (256, 8, 1e-5, 1_246_000, 4868, 147),
    "qwen2.5_1.5b_siglip/finetune": (128, 8, 1e-5, 665_298, 5198, 156),
}
# recipes of other pairs, which change values of share4v_7b: template of stage 2, and the keys that both stages change
PAIRS = {"llama_3_8b_clip": "llama_3", "qwen2.5_7b_siglip": "qwen_2.5", "qwen2.5_1.5b_siglip": "qwen_2.5"}
OFFICIAL = [name for name in RECIPES if name.split("/")[0] not in PAIRS]
CHANGED = {
    "run.directory", "data.train", "data.tokenizer", "data.template", "optim.learning_rate", "optim.clip_grad_norm",
    "optim.projector_learning_rate", "loss.normalize", "train.micro_batch_size", "checkpoint.initialize_from",
}  # fmt: skip
CHANGED_ON_ONE_GPU = {
    "parallel.tensor", "parallel.sequence", "parallel.overlap_grad_reduce", "train.recompute", "train.recompute_tower",
}  # fmt: skip


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
    assert set(RECIPES) == {name for name in found if not name.startswith("quickstart/")}


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
    count, _ = MACHINES.get(name.split("/")[0], (GPUS, "a100"))
    data_parallel = count // (config.parallel.tensor * config.parallel.pipeline)
    assert batch % (micro_batch * data_parallel) == 0


@pytest.mark.parametrize("name", OFFICIAL)
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


@pytest.mark.parametrize("name", OFFICIAL)
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


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_other_pairs_change_only_what_their_comments_explain(pair: str, stage: str) -> None:
    config, official = recipe(f"{pair}/{stage}"), recipe(f"share4v_7b/{stage}")
    values, expected = flat(config), flat(official)
    changed = {key for key in values if values[key] != expected[key] and not key.startswith("model.")}
    assert changed <= CHANGED | (CHANGED_ON_ONE_GPU if pair in MACHINES else set())
    assert config.data.template == ("plain" if stage == "pretrain" else PAIRS[pair])
    assert (config.loss.normalize, config.optim.clip_grad_norm) == ("tokens", 1.0)
    trainable, upper_half = config.model.trainable, {"clip": 12, "siglip": 13}[pair.split("_")[-1]]
    assert trainable.language and trainable.projector
    assert trainable.vision_from_block == (upper_half if stage == "pretrain" else None)
    assert config.optim.projector_learning_rate == (1e-3 if stage == "pretrain" else None)
    assert config.run.directory == f"runs/{pair}/{stage}"
    if stage == "finetune":
        assert config.checkpoint.initialize_from == f"runs/{pair}/pretrain/checkpoints/latest"


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in OFFICIAL])
def test_other_pairs_fit_their_gpus(name: str) -> None:
    config = recipe(name)
    count, gpu = MACHINES.get(name.split("/")[0], (GPUS, "a100"))
    workload = assumed_workload(config, samples=RECIPES[name][3])
    case = Case.of(config, world_size=count, workload=workload, gpu=gpus.GPUS[gpu], assumptions=Assumptions())
    assert list(Prediction(case).refusals()) == []


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in PRESETS], ids=lambda path: path.stem)
def test_presets_state_every_field(path: Path) -> None:
    stated = set(Reader().read_file(path).entries)
    assert stated == {field.name for field in dataclasses.fields(PRESETS[path.parent.name])}


@pytest.mark.parametrize("kind", PRESETS)
def test_every_preset_is_in_the_documentation(kind: str) -> None:
    page = (EXAMPLES.parent / "docs" / "models.md").read_text(encoding="utf-8")
    names = {path.stem for path in (EXAMPLES / "models" / kind).glob("*.yaml") if "quickstart" not in path.stem}
    assert names == {name for name in names if f"`{name}`" in page}


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
