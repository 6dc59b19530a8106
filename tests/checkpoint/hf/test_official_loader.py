"""share4v exports load by the rules of the official ShareGPT4V and LLaVA code, from any working directory."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from forked_tools import run_tool
from hf_fixtures import MODEL, SHARE4V, random_hf_weights, read_safetensors, write_share4v

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.official_loader import LLAVA, SHAREGPT4V
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.errors import ConversionError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    import_model(
        HfSource(directory=write_share4v(root / "s4v", inside=True)), root / "megatron", options=ImportOptions()
    )
    return root / "megatron"


# Directory, and whether ShareGPT4V's and LLaVA's code load it with images: read off their loaders by hand.
NAMES = {
    "/m/llava-sharegpt4v-7b": (True, True),
    "/m/ShareGPT4V-7B_Pretrained_vit-large336-l12": (True, False),
    "/m/llava-v1.5-7b": (False, True),
    "/m/my_sharegpt4v": (False, False),
    "/m/llava_sharegpt4v": (False, True),
    "/m/share4v_7b_original": (False, False),
    "/m/sharegpt4v_run/checkpoint-500": (True, False),
    "/m/sharegpt4v/": (True, False),
    "/m/sharegpt4v/export": (False, False),
}


@pytest.mark.parametrize("path", NAMES)
def test_which_names_are_loaded_with_images(path: str) -> None:
    assert (SHAREGPT4V.is_multimodal(path), LLAVA.is_multimodal(path)) == NAMES[path]


def load_as_the_official_code(export: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """Follow the official loader from another working directory; return the tower and the language model.

    The name has "sharegpt4v" before its first underscore, the tower's path exists or is of openai, laion or Lin-Chen,
    the tower and its processor come from that path, the rest from the directory.
    """
    from transformers import AutoImageProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(elsewhere)
    assert "sharegpt4v" in str(export).strip("/").split("/")[-1].split("_")[0].lower()
    config = json.loads((export / "config.json").read_text())
    name = config["mm_vision_tower"]
    assert os.path.exists(name) or name.startswith(("openai", "laion", "Lin-Chen"))
    processor = AutoImageProcessor.from_pretrained(name, local_files_only=True)
    assert processor.crop_size["height"] == MODEL.vision.image_size
    tower = CLIPVisionModel.from_pretrained(name, local_files_only=True)
    language = LlamaForCausalLM(LlamaConfig(**{**config, "model_type": "llama", "architectures": None}))
    state = read_safetensors(export)
    projector = [name for name in state if name.startswith("model.mm_projector.")]
    assert len(projector) == 4
    language.load_state_dict({name: tensor for name, tensor in state.items() if name not in projector}, strict=True)
    return tower, language


def test_an_export_loads_from_any_directory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="megatron_share4v"):
        export_model(checkpoint, Path("exports/llava-sharegpt4v-7b"), layout="share4v")  # a relative path
    assert "official code" not in caplog.text
    (tmp_path / "elsewhere").mkdir()
    export = tmp_path / "exports" / "llava-sharegpt4v-7b"
    tower, language = load_as_the_official_code(export, tmp_path / "elsewhere", monkeypatch)
    source = random_hf_weights(MODEL, SHARE4V, "projector", "language", "vision")
    loaded = tower.state_dict()
    for name, tensor in source.items():
        if name.startswith(SHARE4V.tower):
            short = name.removeprefix(SHARE4V.tower)
            assert torch.equal(loaded[short if short in loaded else f"vision_model.{short}"], tensor), name
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(language.state_dict()[name], source[name])


def tower_of(export: Path) -> str:
    return json.loads((export / "config.json").read_text())["mm_vision_tower"]


def test_the_name_of_the_tower(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12"
    for number, (given, written) in enumerate({hub: hub, "./towers/a": str(tmp_path / "towers" / "a")}.items()):
        out = tmp_path / f"sharegpt4v-{number}"
        with caplog.at_level(logging.WARNING, logger="megatron_share4v"):
            export_model(checkpoint, out, layout="share4v", tower=given)
        assert tower_of(out) == written and (out / "clip" / "model.safetensors").is_file()
    assert f"mm_vision_tower {tmp_path / 'towers' / 'a'} does not exist here" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="megatron_share4v"):
        export_model(checkpoint, tmp_path / "share4v_x", layout="share4v", tower="someone/clip")
    assert "mm_vision_tower 'someone/clip' is refused by the official code" in caplog.text
    assert "share4v_x: the official code would load it as a plain language model" in caplog.text
    assert "ShareGPT4V reads 'share4v' and LLaVA reads 'share4v_x'" in caplog.text
    with pytest.raises(ConversionError, match="--tower-name a: the layout llava-hf names no tower"):
        export_model(checkpoint, tmp_path / "x", layout="llava-hf", tower="a")
    with pytest.raises(ConversionError, match="--tower-name is empty"):
        export_model(checkpoint, tmp_path / "x", layout="share4v", tower=" ")
    assert not (tmp_path / "x").exists()


def test_a_moved_export_is_imported_again(checkpoint: Path, tmp_path: Path) -> None:
    """config.json still names the old place, where another export may lie by now."""
    export_model(checkpoint, tmp_path / "sharegpt4v-7b", layout="share4v")
    (tmp_path / "sharegpt4v-7b").rename(tmp_path / "moved")
    import_model(HfSource(directory=tmp_path / "moved"), tmp_path / "again", options=ImportOptions())


def test_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "sharegpt4v-7b"
    done = run_tool(
        "tools/convert.py",
        "export",
        "--from",
        checkpoint,
        "--to",
        out,
        "--layout",
        "share4v",
        "--tower-name",
        "openai/c",
    )
    assert done.returncode == 0, done.stderr
    assert tower_of(out) == "openai/c" and "mm_vision_tower is openai/c" in done.stderr
