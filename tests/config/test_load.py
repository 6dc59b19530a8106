"""Loading of configurations: precedence of sources, all problems with their locations, dump and schema."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_share4v.config.load import dump, json_schema, load, load_run
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError

COMPLETE = """\
run: {directory: runs/x}
data: {train: shards, tokenizer: tokenizer.model}
train: {global_batch_size: 8}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = Path("run.yaml")
    file.write_text(COMPLETE, encoding="utf-8")
    return file


def load_problems(path: Path, *overrides: str, add: str = "") -> list[str]:
    path.write_text(path.read_text(encoding="utf-8") + add, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_run(path, overrides)
    return str(raised.value).splitlines()


def test_order_defaults_base_file_override(path: Path) -> None:
    Path("base.yaml").write_text(
        COMPLETE + "optim: {learning_rate: 1e-3, beta1: 0.8, weight_decay: 0.1}\n", encoding="utf-8"
    )
    path.write_text("base: base.yaml\noptim: {beta1: 0.7, weight_decay: 0.2}\n", encoding="utf-8")
    optim = load_run(path, ["optim.weight_decay=3e-1"]).optim
    assert (optim.beta2, optim.learning_rate, optim.beta1, optim.weight_decay) == (0.999, 1e-3, 0.7, 0.3)


def test_model_preset_in_the_model_section(path: Path) -> None:
    Path("tiny.yaml").write_text("vision: {num_layers: 4}\nlanguage: {num_layers: 2}\n", encoding="utf-8")
    model = load_run(path, ["model.base=tiny.yaml", "model.trainable.vision_from_block=1"]).model
    assert (model.vision.num_layers, model.language.num_layers, model.trainable.vision_from_block) == (4, 2, 1)


def test_load_without_overrides(path: Path) -> None:
    assert load_run(str(path)) == load(RunConfig, path, [])


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("parallel.tensr=2", "parallel.tensr: unknown key; did you mean 'tensor'?"),
        ("learning_rate=1e-3", "learning_rate: unknown key; did you mean 'optim.learning_rate'?"),
        ("precision.zebra=1", "precision.zebra: unknown key; known here: dtype"),
        ("train.steps=1e3", "train.steps: should be a valid integer, got 1000.0"),
        ("train.steps=0", "train.steps: should be greater than 0, got 0"),
        ("parallel.tensor=true", "parallel.tensor: should be a valid integer, got true"),
        ("optim.learning_rate=true", "optim.learning_rate: should be a valid number, got true"),
        ("optim.learning_rate=.inf", "optim.learning_rate: should be a finite number, got Infinity"),
        ("optim.learning_rate='2e-5'", 'optim.learning_rate: should be a valid number, got "2e-5"'),
        ("log.tensorboard=1", "log.tensorboard: should be a valid boolean, got 1"),
        ("run.directory=", "run.directory: should be a valid string, got null"),
        ("precision.dtype=fp8", "precision.dtype: should be 'fp32' or 'bf16', got \"fp8\""),
        ("ops=fused", "ops: should be 'auto', 'native' or 'reference', got \"fused\""),
        ("log=3", "log: should be a section of `key: value` lines for LogConfig, got 3"),
        ("train.steps.x=3", 'train.steps: should be a valid integer, got {"x": 3}'),
        ("parallel.sequence=true", "parallel.sequence: sequence true needs tensor > 1, got tensor 1"),
        (
            "parallel.context=3",
            "parallel.context: model.language.num_attention_heads 32 "
            "is not divisible by parallel.tensor 1 x parallel.context 3",
        ),
        (
            "parallel.tensor=3",
            "parallel.tensor: model.language.num_attention_heads 32 is not divisible by parallel.tensor 3",
        ),
        ("model.vision.image_size=13", "model.vision.image_size: patch_size 14 is larger than image_size 13"),
        (
            "data.max_text_length=4000",
            "data.max_text_length: data.max_text_length 4000 with one image takes 4575 positions",
        ),
    ],
)
def test_one_wrong_override(path: Path, override: str, what: str) -> None:
    found = load_problems(path, override)
    assert found[0].startswith(f"command line: {override}: {what}")


def test_missing_keys_name_their_section(path: Path) -> None:
    path.write_text("data:\n  train: shards\n", encoding="utf-8")
    assert load_problems(path) == [
        "run.yaml: run: required key is missing",
        "run.yaml: train: required key is missing",
        "run.yaml:1: data.tokenizer: required key is missing",
    ]


def test_all_problems_are_reported_in_file_order(path: Path) -> None:
    path.write_text(
        "run: {}\n"
        "data: {train: shards, tokenizer: t, max_text_length: 4000}\n"
        "parallel:\n"
        "  pipelin: 2\n"
        "  sequence: true\n"
        "model:\n"
        "  vision: {image_size: 13, zebra: 1}\n"
        "  language: {hidden_size: 100, num_layers: 2}\n"
        "  trainable: {language: false, projector: false}\n"
        "train: {global_batch_size: 3, micro_batch_size: 2, steps: many}\n",
        encoding="utf-8",
    )
    assert load_problems(path, "optim.beta1=2", "broken", "parallel.virtual=0") == [
        "command line: broken: write dotted.key=value, for example train.steps=100",
        "command line: parallel.virtual=0: parallel.virtual: should be greater than 0, got 0",
        "command line: optim.beta1=2: optim.beta1: should be less than or equal to 1, got 2",
        "run.yaml:1: run.directory: required key is missing",
        "run.yaml:4: parallel.pipelin: unknown key; did you mean 'pipeline'?",
        "run.yaml:5: parallel.sequence: sequence true needs tensor > 1, got tensor 1",
        "run.yaml:7: model.vision.zebra: unknown key; known here: model_type, image_size, patch_size, hidden_size, "
        "intermediate_size, num_layers, num_attention_heads, layer_norm_eps, feature_layer, feature_select, "
        "class_token, patch_bias, pre_norm, layer_scale, activation, image_mean, image_std, resample, resize, "
        "resize_edge",
        "run.yaml:7: model.vision.image_size: patch_size 14 is larger than image_size 13",
        "run.yaml:8: model.language.hidden_size: hidden_size 100 is not a multiple of num_attention_heads 32",
        "run.yaml:9: model.trainable.language: nothing trains: switch on language, projector or vision_from_block",
        'run.yaml:10: train.steps: should be a valid integer, got "many"',
        "run.yaml:10: train.global_batch_size: global_batch_size 3 is not a multiple of micro_batch_size 2",
    ]


def test_cross_section_checks_run_despite_other_problems(path: Path) -> None:
    found = load_problems(path, "parallel.tensor=3", "log.zebra=1")
    assert (
        sum("is not divisible by parallel.tensor 3" in problem for problem in found) == 5
    )  # attention heads, widths, vocabulary
    assert sum("log.zebra: unknown key" in problem for problem in found) == 1
    assert any("num_key_value_heads 32 and parallel.tensor 3" in problem for problem in found)


def test_conflicts_with_an_invalid_value_are_not_reported(path: Path) -> None:
    assert load_problems(path, "parallel.tensor=x", "parallel.sequence=true") == [
        'command line: parallel.tensor=x: parallel.tensor: should be a valid integer, got "x"'
    ]
    assert load_problems(path, "parallel.tensr=2", "parallel.sequence=true") == [
        "command line: parallel.tensr=2: parallel.tensr: unknown key; did you mean 'tensor'?"
    ]


def test_conflict_is_located_at_its_override(path: Path) -> None:
    add = "parallel: {tensor: 4}\nmodel: {vision: {num_attention_heads: 16}, language: {num_attention_heads: 32}}\n"
    found = load_problems(path, "model.vision.num_attention_heads=2", add=add)
    where = "command line: model.vision.num_attention_heads=2: model.vision.num_attention_heads"
    assert found == [f"{where}: model.vision.num_attention_heads 2 is not divisible by parallel.tensor 4"]


def test_unreadable_base_files_hide_other_problems(path: Path) -> None:
    found = load_problems(path, "zebra=1", add="base: [none.yaml, also_none.yaml]\n")
    assert [problem.partition(": cannot")[0] for problem in found] == [
        "run.yaml:4: base: none.yaml",
        "run.yaml:4: base: also_none.yaml",
    ]


def test_dump_round_trips(path: Path) -> None:
    overrides = [
        "optim.learning_rate=2e-5",
        "run.directory='Übung: 1'",
        "schedule.warmup_steps=3",
        "checkpoint.initialize_from='null'",
    ]
    config = load_run(path, overrides)
    Path("resolved.yaml").write_text(dump(config), encoding="utf-8")
    assert load_run("resolved.yaml") == config
    assert "eps: 1.0e-08" in dump(config) and "base" not in dump(config)


def test_schema_allows_base_and_forbids_unknown_keys() -> None:
    schema = json_schema(RunConfig)
    assert schema["additionalProperties"] is False
    assert "base" in schema["properties"] and "base" in schema["$defs"]["ModelConfig"]["properties"]
    assert "interleaved" in schema["$defs"]["ParallelConfig"]["properties"]["virtual"]["description"]


def test_objects_built_in_python_are_validated_and_frozen() -> None:
    with pytest.raises(ValidationError, match="sequence true needs tensor > 1.*|virtual 2 needs pipeline > 1"):
        ParallelConfig(sequence=True, virtual=2)
    with pytest.raises(ValidationError, match="tower has blocks 0..22"):
        ModelConfig(trainable={"vision_from_block": 23})
    with pytest.raises(ValidationError, match="patch_size 14 is larger than image_size 13"):
        dataclasses.replace(ModelConfig().vision, image_size=13)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelConfig().tensor = 2
