"""Towers of every place and choice: the Hugging Face cache, two towers, stage 1, and ZeRO-3's empty tensors."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from forked_tools import run_tool
from hf_fixtures import (
    CLIP,
    MODEL,
    SHARE4V,
    random_hf_weights,
    write_clip,
    write_json,
    write_llama,
    write_llava_hf,
    write_share4v,
)

from megatron_share4v.checkpoint.hf.auto_import import is_hf_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model, megatron_tensors
from megatron_share4v.checkpoint.hf.source.model import HfSource, open_hf_model
from megatron_share4v.errors import ConversionError

OPENAI, TUNED = "openai/clip-vit-large-patch14-336", "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12"
CLASS = "vision_model.embeddings.class_embedding"


def cached(cache: Path, name: str, source: Path, *, revisions: tuple[str, ...] = ("0a1b",), main: bool = True) -> Path:
    """Put a directory into a Hugging Face cache as the library does: blobs, links to them, and a reference."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for revision in revisions:
        snapshot = repository / "snapshots" / revision
        for path in (path for path in source.rglob("*") if path.is_file()):
            blob = repository / "blobs" / path.relative_to(source).as_posix().replace("/", "_")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revisions[0])
    return repository


def class_token(source: HfSource) -> torch.Tensor:
    """Return the class embedding, by which the tests tell towers."""
    return megatron_tensors(open_hf_model(source), seed=0)["vision.class_embedding"].read()


def of_seed(seed: int) -> torch.Tensor:
    return random_hf_weights(MODEL, CLIP, "vision", seed=seed)[CLASS]


def refused(source: HfSource) -> str:
    with pytest.raises(ConversionError) as caught:
        open_hf_model(source)
    return str(caught.value)


@pytest.mark.parametrize("form", ["repository", "snapshots", "snapshot"])
def test_directories_of_the_hugging_face_cache(form: str, tmp_path: Path) -> None:
    """Given as --from, --tower and --base; the tower that config.json names is found in the same cache."""
    cache = tmp_path / "hub"
    paths = [
        cached(cache, "Lin-Chen/ShareGPT4V-7B", write_share4v(tmp_path / "s4v", tower=TUNED)),
        cached(cache, TUNED, write_clip(tmp_path / "clip", seed=5)),
        cached(cache, "lmsys/vicuna-7b-v1.5", write_llama(tmp_path / "llama")),
    ]
    tails = {"repository": "", "snapshots": "snapshots", "snapshot": "snapshots/0a1b"}
    model, tower, vicuna = (path / tails[form] for path in paths)
    assert torch.equal(class_token(HfSource(directory=model, tower=tower)), of_seed(5))
    assert torch.equal(class_token(HfSource(directory=model)), of_seed(5))
    manifest = import_model(HfSource(directory=model), tmp_path / "checkpoint", options=ImportOptions())
    assert manifest.source == "share4v: ShareGPT4V-7B, ShareGPT4V-7B_Pretrained_vit-large336-l12"
    stage_1 = tmp_path / "stage_1"
    write_json(stage_1 / "config.json", json.loads((tmp_path / "s4v" / "config.json").read_text()))
    torch.save(random_hf_weights(MODEL, SHARE4V, "projector"), stage_1 / "mm_projector.bin")
    assert torch.equal(class_token(HfSource(directory=stage_1, base=vicuna, tower=tower)), of_seed(5))
    # A path in the cache that training wrote into config.json; another tower is refused by its repository's name.
    config = json.loads((tmp_path / "s4v" / "config.json").read_text())
    elsewhere = f"/data/hub/models--{TUNED.replace('/', '--')}/snapshots/9f9f"
    write_json(tmp_path / "s4v" / "config.json", {**config, "mm_vision_tower": elsewhere})
    assert torch.equal(class_token(HfSource(directory=tmp_path / "s4v", tower=tower)), of_seed(5))
    other = cached(cache, OPENAI, write_clip(tmp_path / "openai", seed=6)) / tails[form]
    assert "another tower than the model's" in refused(HfSource(directory=tmp_path / "s4v", tower=other))


def test_which_snapshot(tmp_path: Path) -> None:
    source = write_llava_hf(tmp_path / "hf")
    several = cached(tmp_path / "a", "x/y", source, revisions=("1", "2"), main=False)
    assert "which snapshot? It has 1, 2" in refused(HfSource(directory=several))
    assert open_hf_model(HfSource(directory=several / "snapshots" / "2")).config == MODEL
    main = cached(tmp_path / "b", "x/y", source, revisions=("2", "1"))
    assert open_hf_model(HfSource(directory=main)).directories == (main / "snapshots" / "2",) and is_hf_model(main)
    (main / "refs" / "main").write_text("3")
    assert "snapshots/3: missing" in refused(HfSource(directory=main))
    shutil.rmtree(main / "refs")
    shutil.rmtree(main / "snapshots" / "1")
    assert open_hf_model(HfSource(directory=main)).directories == (main / "snapshots" / "2",)
    done = run_tool("tools/convert.py", "import", "--from", several, "--to", tmp_path / "out")
    assert done.returncode == 2 and "which snapshot" in done.stderr and "Traceback" not in done.stderr


def test_a_tower_inside_beside_a_guessed_one(tmp_path: Path) -> None:
    """A folder that happens to have the name of config.json's hub name is no second tower, unless it is chosen."""
    model = write_share4v(tmp_path / "weights" / "s4v", tower=OPENAI, inside=True)
    inside = random_hf_weights(MODEL, SHARE4V, "projector", "language", "vision")[f"{SHARE4V.tower}{CLASS[13:]}"]
    sibling = write_clip(tmp_path / "weights" / "clip-vit-large-patch14-336", seed=5)
    assert torch.equal(class_token(HfSource(directory=model)), inside)
    assert torch.equal(class_token(HfSource(directory=model, use_tower="folder")), of_seed(5))
    message = refused(HfSource(directory=model, tower=sibling))
    assert "two towers" in message and "--use-tower inside or --use-tower folder" in message
    for use, expected in (("inside", inside), ("folder", of_seed(5))):
        assert torch.equal(class_token(HfSource(directory=model, tower=sibling, use_tower=use)), expected)


@pytest.mark.parametrize("place", ["clip", "named"])
def test_a_tower_inside_and_one_that_is_meant(place: str, tmp_path: Path) -> None:
    """The folder that a fine-tuned model's config.json names, or one in its own directory: a choice is needed."""
    folder = tmp_path / "s4v" / "clip" if place == "clip" else tmp_path / "start"
    model = write_share4v(tmp_path / "s4v", tower=str(folder), inside=True)
    write_clip(folder, seed=5)
    inside = random_hf_weights(MODEL, SHARE4V, "projector", "language", "vision")[f"{SHARE4V.tower}{CLASS[13:]}"]
    assert "choose with --use-tower inside" in refused(HfSource(directory=model))
    assert torch.equal(class_token(HfSource(directory=model, use_tower="inside")), inside)
    assert torch.equal(class_token(HfSource(directory=model, use_tower="folder")), of_seed(5))


def test_a_choice_without_two_towers(tmp_path: Path) -> None:
    model = write_share4v(tmp_path / "s4v", tower=OPENAI)
    write_clip(model / "clip", seed=5)
    assert "has no vision tower among its weights" in refused(HfSource(directory=model, use_tower="inside"))
    assert torch.equal(class_token(HfSource(directory=model, use_tower="folder")), of_seed(5))
    llava = write_llava_hf(tmp_path / "hf")
    assert "leave --tower and --use-tower out" in refused(HfSource(directory=llava, use_tower="folder"))


def test_the_models_own_folder_precedes_guesses(tmp_path: Path) -> None:
    """What training with a tuned tower saves: the folder vision_tower, and a config.json with OpenAI's name."""
    model = write_share4v(tmp_path / "s4v", tower=OPENAI)
    write_clip(tmp_path / "clip-vit-large-patch14-336", seed=5)
    write_clip(model / "vision_tower", seed=6)
    assert torch.equal(class_token(HfSource(directory=model)), of_seed(6))


def test_a_published_stage_1_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its config.json names OpenAI's tower, and it was trained with the one published beside it."""
    model = write_share4v(tmp_path / f"{TUNED.split('/')[1]}_vicuna-7b-v1.5", tower=OPENAI)
    openai = write_clip(tmp_path / "clip-vit-large-patch14-336", seed=5)
    message = refused(HfSource(directory=model))
    assert f"trained with {TUNED}, by its name; its config.json still names {OPENAI}" in message
    assert "another tower than the model's" in refused(HfSource(directory=model, tower=openai))
    tuned = write_clip(tmp_path / TUNED.split("/")[1], seed=6)
    with caplog.at_level(logging.INFO, logger="megatron_share4v"):
        assert torch.equal(class_token(HfSource(directory=model)), of_seed(6))
    assert f"tower: {tuned}" in caplog.text
    assert torch.equal(class_token(HfSource(directory=model, tower=tuned)), of_seed(6))
    assert torch.equal(class_token(HfSource(directory=model, tower=openai, any_tower=True)), of_seed(5))


@pytest.mark.parametrize("key", ["tune_entire_model", "tune_vision_tower", "unfreeze_mm_vision_tower"])
def test_a_model_whose_tower_was_trained(key: str, tmp_path: Path) -> None:
    """Whatever the directory is called, config.json says that the tower which it names is only the start."""
    model = write_share4v(tmp_path / "run", tower=OPENAI)
    write_json(model / "config.json", {**json.loads((model / "config.json").read_text()), key: True})
    openai = write_clip(tmp_path / "clip-vit-large-patch14-336", seed=5)
    assert f"its vision tower was trained ({key} is true" in refused(HfSource(directory=model))
    assert "is the tower that training started from" in refused(HfSource(directory=model, tower=openai))
    tuned = write_clip(tmp_path / "tuned", seed=6)
    assert torch.equal(class_token(HfSource(directory=model, tower=tuned)), of_seed(6))
    assert torch.equal(class_token(HfSource(directory=model, tower=openai, any_tower=True)), of_seed(5))
    write_clip(model / "vision_tower", seed=7)
    assert torch.equal(class_token(HfSource(directory=model)), of_seed(7))


def empty(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: torch.empty(0) if part in name else tensor for name, tensor in tensors.items()}


def test_empty_tensors_of_zero_3(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A frozen tower's are left out, and the tower comes from a folder; others are refused by name."""
    model = write_share4v(tmp_path / "s4v", tower=OPENAI, inside=True)
    whole = {path: torch.load(path) for path in model.glob("*.bin")}
    for path, tensors in whole.items():
        torch.save(empty(tensors, "vision_tower"), path)
    assert "has no vision tower" in refused(HfSource(directory=model))
    tower = write_clip(tmp_path / "clip-vit-large-patch14-336", seed=5)
    with caplog.at_level(logging.WARNING, logger="megatron_share4v"):
        assert torch.equal(class_token(HfSource(directory=model)), of_seed(5))
    assert "tower tensors are empty, as DeepSpeed ZeRO-3" in caplog.text
    assert torch.equal(class_token(HfSource(directory=model, tower=tower)), of_seed(5))
    for part in ("encoder.layers.2.", "mm_projector", "layers.1.mlp"):
        for path, tensors in whole.items():
            torch.save(empty(tensors, part), path)
        message = refused(HfSource(directory=model))
        assert "empty tensor: " in message and part in message and "stage3_gather_16bit_weights" in message
    torch.save(empty(random_hf_weights(MODEL, SHARE4V, "projector"), "mm_"), tmp_path / "mm_projector.bin")
    llama = write_llama(tmp_path / "llama")
    source = HfSource(directory=llama, tower=tower, projector=tmp_path / "mm_projector.bin")
    assert "empty tensor: model.mm_projector.0.weight has shape (0,)" in refused(source)
    pair = {f"base_model.model.model.layers.1.mlp.up_proj.lora_{part}.weight": torch.empty(0) for part in "AB"}
    (tmp_path / "lora").mkdir()
    torch.save(pair, tmp_path / "lora" / "adapter_model.bin")
    write_json(tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    assert "empty tensor: base_model" in refused(HfSource(directory=tmp_path / "lora", base=llama, tower=tower))


def test_directories_in_place_of_files(tmp_path: Path) -> None:
    """--projector and --tokenizer take the directory of a stage 1, and its repository in the cache."""
    llama, tower = write_llama(tmp_path / "llama"), write_clip(tmp_path / "clip")
    stage_1 = tmp_path / "stage_1"
    stage_1.mkdir()
    projector = random_hf_weights(MODEL, SHARE4V, "projector", seed=4)
    torch.save(projector, stage_1 / "mm_projector.bin")
    (llama / "tokenizer.model").rename(stage_1 / "tokenizer.model")
    for directory in (stage_1, cached(tmp_path / "hub", "liuhaotian/projector", stage_1)):
        source = HfSource(directory=llama, tower=tower, projector=directory, tokenizer=directory)
        tensors = megatron_tensors(open_hf_model(source), seed=0)
        assert torch.equal(tensors["projector.mlp.linear_fc1.weight"].read(), projector["model.mm_projector.0.weight"])
    message = refused(HfSource(directory=llama, tower=tower, projector=tower, tokenizer=stage_1))
    assert f"{tower / 'mm_projector.bin'}: there is no such file" in message
