"""An imported model starts stage 1, then stage 2 and an export; another model or tower is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from forked_tools import run_tool
from hf_fixtures import (
    CLIP,
    MODEL,
    SHARE4V,
    llama_config,
    random_hf_weights,
    read_safetensors,
    write_clip,
    write_json,
    write_weights,
)

from megatron_share4v.checkpoint.assets import asset_files, copy_assets_to_run
from megatron_share4v.checkpoint.compatibility import check_initial_model
from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.manifest import read_manifest
from megatron_share4v.config.load import dump
from megatron_share4v.config.run import CheckpointConfig
from megatron_share4v.errors import CheckpointError
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer

SIZED = replace(MODEL, language=replace(MODEL.language, vocab_size=400))

BUILT = "decoder layers per pipeline rank"
"""Log line of a built model."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set, an imported Vicuna + CLIP with the same tokenizer, and a run's YAML file."""
    from examples.quickstart.dataset import write_dataset
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("stage")
    write_dataset(root / "scenes", train_scenes=16, held_out_scenes=64, seed=3, image_size=28)
    annotations = root / "scenes" / "finetune.json"
    texts = [turn["value"] for record in json.loads(annotations.read_text()) for turn in record["conversations"]]
    (root / "llama").mkdir()
    train_tokenizer(texts, root / "llama" / "tokenizer.model", vocab_size=400)
    prepare(
        PrepareOptions(
            annotations=annotations,
            images=root / "scenes",
            output=root / "data",
            tokenizer=root / "llama" / "tokenizer.model",
            template="vicuna_v1",
            max_text_length=400,
            samples_per_shard=16,
            max_rejected_fraction=0.0,
            workers=0,
            overwrite=False,
        )
    )
    write_weights(root / "llama", random_hf_weights(SIZED, SHARE4V, "language"))
    write_json(root / "llama" / "config.json", llama_config(SIZED))
    import_model(
        HfSource(directory=root / "llama", tower=write_clip(root / "clip")), root / "start", options=ImportOptions()
    )
    model = yaml.safe_load(read_manifest(root / "start").config)["model"]
    content = {
        "run": {"directory": str(root / "unset")},
        "model": model,
        "precision": {"dtype": "fp32"},
        "data": {
            "train": str(root / "data"),
            "tokenizer": str(root / "llama" / "tokenizer.model"),
            "max_text_length": 400,
            "num_workers": 0,
        },
        "optim": {"learning_rate": 1e-3},
        "schedule": {"kind": "constant", "warmup_ratio": 0.0},
        "train": {"global_batch_size": 2, "steps": 1},
        "log": {"tensorboard": False},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    return root


def train(stage: Path, *overrides: str, ranks: int = 1) -> CompletedProcess:
    return run_tool("tools/train.py", stage / "run.yaml", *overrides, ranks=ranks)


def test_two_stages_and_an_export(stage: Path) -> None:
    first, second = stage / "first", stage / "second"
    frozen = ("model.trainable.language=false", "model.trainable.projector=true")
    tower = read_manifest(stage / "start").weights["vision"]
    start = (f"checkpoint.initialize_from={stage / 'start'}", f"checkpoint.expect_tower={tower}")
    done = train(stage, f"run.directory={first}", *start, *frozen)
    assert done.returncode == 0, done.stderr
    assert f"tower sha256 {tower}" in done.stderr and BUILT in done.stderr
    assert read_manifest(first / "checkpoints" / "step_00000001").weights == {
        "vision": tower
    }  # the tower is frozen, so its hash is the import's
    layout = ("parallel.tensor=2", "parallel.sequence=true")
    done = train(stage, f"run.directory={second}", f"checkpoint.initialize_from={first}", *layout, ranks=2)
    assert done.returncode == 0, done.stderr
    checkpoint = second / "checkpoints" / "step_00000001"
    assert read_manifest(checkpoint).weights == {"vision": tower}  # equal at every layout
    assert (checkpoint / "tokenizer.model").read_bytes() == (stage / "llama" / "tokenizer.model").read_bytes()
    export_model(second, stage / "out", layout="llava-hf")
    weights, tower = read_safetensors(stage / "out"), random_hf_weights(MODEL, CLIP, "vision")
    for name, tensor in tower.items():  # frozen, and its unused weights were kept through both stages
        assert torch.equal(weights[f"vision_tower.{name}"], tensor), name
    trained = weights["language_model.model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(
        trained, random_hf_weights(SIZED, SHARE4V, "language")["model.layers.0.mlp.down_proj.weight"]
    )


def test_another_tower_is_refused(stage: Path) -> None:
    """The configurations differ; this is found before the model is built, which may not fit into the memory."""
    start = f"checkpoint.initialize_from={stage / 'start'}"
    done = train(stage, f"run.directory={stage / 'refused'}", start, "model.vision.feature_layer=-3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "is of another tower than this run's: model.vision.feature_layer is -3 here, -2 in the checkpoint"
        in done.stderr
    )
    assert BUILT not in done.stderr


def test_another_tower_of_the_same_shape_is_refused(stage: Path) -> None:
    """Equal configuration, other weights: like OpenAI's CLIP and ShareGPT4V's fine-tuned tower."""
    tuned = HfSource(directory=stage / "llama", tower=write_clip(stage / "tuned", seed=5))
    import_model(tuned, stage / "other", options=ImportOptions())
    expected, stored = (read_manifest(stage / name).weights["vision"] for name in ("start", "other"))
    assert expected != stored
    start = (f"checkpoint.initialize_from={stage / 'other'}", f"checkpoint.expect_tower={expected}")
    done = train(stage, f"run.directory={stage / 'refused'}", *start)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"its tower is not the one of checkpoint.expect_tower: sha256 {stored}, expected {expected}" in done.stderr
    manifest = read_manifest(stage / "other")
    check_initial_model(manifest, SIZED, where=stage, expect_tower=stored)
    with pytest.raises(CheckpointError, match="does not state its tower's hash"):
        check_initial_model(replace(manifest, weights={}), SIZED, where=stage, expect_tower=stored)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expect_tower": "5ca1ab1e", "initialize_from": "x"}, "is no SHA-256"),
        ({"expect_tower": "0" * 64}, "there is no tower to check"),
    ],
)
def test_a_hash_that_checks_nothing(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CheckpointConfig(**options)


def test_unused_weights_of_an_earlier_start_are_not_inherited(stage: Path, tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(stage / "llama" / "tokenizer.model")
    folder = copy_assets_to_run(tmp_path, tokenizer=tokenizer, start=stage / "start", resumes=False)
    assert len(asset_files(folder)) == 3
    copy_assets_to_run(tmp_path, tokenizer=tokenizer, start=None, resumes=True)
    assert len(asset_files(folder)) == 3
    copy_assets_to_run(tmp_path, tokenizer=tokenizer, start=stage, resumes=False)  # a checkpoint without unused weights
    assert [path.name for path in asset_files(folder)] == ["tokenizer.model", "tokenizer_config.json"]


def test_another_model_is_refused_and_a_longer_one_is_not(stage: Path) -> None:
    manifest = read_manifest(stage / "start")
    longer = replace(SIZED, language=replace(SIZED.language, max_position_embeddings=2048))
    check_initial_model(manifest, longer, where=stage)
    with pytest.raises(
        CheckpointError,
        match=r"another model than this run's: model.language.rope_theta is 5.0 here, 10000.0 in the checkpoint; "
        r"use its model section \(tools/convert.py inspect .* prints it\)",
    ):
        check_initial_model(manifest, replace(SIZED, language=replace(SIZED.language, rope_theta=5.0)), where=stage)
    with pytest.raises(CheckpointError, match="configuration is of another version"):
        check_initial_model(replace(manifest, config=dump(SIZED)), SIZED, where=stage)
