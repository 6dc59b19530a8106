"""tools/convert.py from the command line: every command, exit codes, and one message per user error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from forked_tools import run_tool
from hf_fixtures import read_safetensors, write_clip, write_llama, write_llava_hf, write_weights

from megatron_share4v.checkpoint.hf.average import average_checkpoints
from megatron_share4v.checkpoint.hf.exporter import export_model, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.verify import verify_conversion
from megatron_share4v.checkpoint.inspect import describe_checkpoint
from megatron_share4v.checkpoint.manifest import read_manifest, write_manifest
from megatron_share4v.checkpoint.retention import prune_checkpoints
from megatron_share4v.errors import CheckpointError, ConversionError

ROOT = Path(__file__).resolve().parents[3]


def convert(*arguments: object) -> CompletedProcess:
    return run_tool("tools/convert.py", *arguments)


def test_an_export_of_an_import_has_the_same_weights(tmp_path: Path) -> None:
    source, megatron, back = write_llava_hf(tmp_path / "hf"), tmp_path / "megatron", tmp_path / "back"
    done = convert("import", "--from", source, "--to", megatron, "--image-orientation", "exif")
    assert open_checkpoint(megatron).config.data.image_orientation == "exif"
    assert done.returncode == 0 and "vision: sha256" in done.stderr, done.stderr
    done = convert(
        "export", "--from", megatron, "--to", back, "--layout", "llava-hf", "--dtype", "bf16", "--shard-gb", "0.0001"
    )
    assert done.returncode == 0 and len(list(back.glob("model-*"))) > 1, done.stderr
    assert done.stderr.count(": sha256 ") == 3
    (back / "preprocessor_config.json").unlink()
    done = convert("verify", "--hf", back, "--checkpoint", megatron, "--logits")
    assert done.returncode == 2 and "transformers cannot load its processor" in done.stderr
    # The comparison's result is printed before the error.
    assert "72 tensors equal" in done.stdout and "72 of them after rounding" in done.stdout, done.stderr


def test_mistakes_end_with_2_and_one_message(tmp_path: Path) -> None:
    done = convert("import", "--from", tmp_path / "nowhere", "--to", tmp_path / "megatron")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "nowhere" in done.stderr
    done = convert("export", "--from", tmp_path / "nowhere", "--to", tmp_path / "x", "--layout", "llava-hf")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert convert("export", "--from", "a", "--to", "b", "--layout", "gguf").returncode == 2


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    tower = write_clip(tmp_path / "clip")
    paths = []
    for seed in (1, 2):
        llama = write_llama(tmp_path / f"llama{seed}", seed=seed)
        paths.append(tmp_path / f"checkpoint{seed}")
        import_model(HfSource(directory=llama, tower=tower), paths[-1], options=ImportOptions(seed=seed))
    return paths


def test_average(checkpoints: list[Path], tmp_path: Path) -> None:
    one, two = (open_checkpoint(path).weights for path in checkpoints)
    manifest = average_checkpoints(checkpoints, tmp_path / "mean")
    mean = open_checkpoint(tmp_path / "mean")
    assert (
        manifest.source == "mean of checkpoint1, checkpoint2"
        and len(mean.unused) == 18
        and mean.tokenizer.path.parent == tmp_path / "mean"
    )
    for name, tensor in mean.weights.items():
        assert torch.equal(tensor.read(), (one[name].read() + two[name].read()) / 2)
    alone = average_checkpoints(checkpoints[:1], tmp_path / "alone")
    assert alone.weights == open_checkpoint(checkpoints[0]).manifest.weights


def test_rows_after_the_vocabulary_are_averaged_or_dropped(tmp_path: Path) -> None:
    names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    paths = []
    for factor in (1, 3):
        source = write_llava_hf(tmp_path / f"hf{factor}")
        write_weights(source, {name: tensor * factor for name, tensor in read_safetensors(source).items()})
        paths.append(tmp_path / f"checkpoint{factor}")
        import_model(HfSource(directory=source), paths[-1], options=ImportOptions())
    before = read_safetensors(tmp_path / "hf1")
    average_checkpoints(paths, tmp_path / "mean")
    export_model(tmp_path / "mean", tmp_path / "out", layout="llava-hf")
    after = read_safetensors(tmp_path / "out")
    assert all(torch.allclose(after[name], 2 * before[name]) for name in before)
    manifest = read_manifest(paths[1])
    write_manifest(paths[1], replace(manifest, state=replace(manifest.state, step=4)))
    average_checkpoints(paths[::-1], tmp_path / "trained")  # step 0, as the import
    export_model(tmp_path / "trained", tmp_path / "out2", layout="llava-hf")
    rows = read_safetensors(tmp_path / "out2")[names[0]]
    assert torch.equal(rows[300:], rows[:300].mean(0, keepdim=True).expand(20, -1))


def test_what_cannot_be_averaged(checkpoints: list[Path], tmp_path: Path) -> None:
    write_llama(tmp_path / "half", dtype="bf16")
    import_model(
        HfSource(directory=tmp_path / "half", tower=tmp_path / "clip"),
        tmp_path / "half3",
        options=ImportOptions(),
    )
    with pytest.raises(
        ConversionError, match=r"half3: cannot be averaged with .*checkpoint1: .* torch.bfloat16, there .*float32"
    ):
        average_checkpoints([checkpoints[0], tmp_path / "half3"], tmp_path / "mean")


def test_mixed_dtypes_are_exported_as_stored(checkpoints: list[Path], tmp_path: Path) -> None:
    """An fp16 language model with an fp32 tower, as people publish them: bit for bit, in both layouts."""
    write_llama(tmp_path / "half", dtype="fp16")
    source = HfSource(directory=tmp_path / "half", tower=tmp_path / "clip")
    manifest = import_model(source, tmp_path / "mixed", options=ImportOptions())
    for layout in ("llava-hf", "share4v"):
        out = tmp_path / layout
        export_model(tmp_path / "mixed", out, layout=layout)
        provenance, config = (json.loads((out / f"{name}.json").read_text()) for name in ("provenance", "config"))
        assert provenance["dtype"] == {"vision": "fp32", "projector": "fp16", "language": "fp16"}
        assert provenance["weights"] == manifest.weights and config["torch_dtype"] == "float16"
        tower = config["vision_config"] if layout == "llava-hf" else json.loads((out / "clip/config.json").read_text())
        assert tower["torch_dtype"] == "float32"
        again = import_model(HfSource(directory=out), tmp_path / f"again_{layout}", options=ImportOptions())
        assert again.weights == manifest.weights
        assert verify_conversion(HfSource(directory=out), tmp_path / "mixed").rounded == 0
    tensors = read_safetensors(tmp_path / "llava-hf")
    assert {tensor.dtype for name, tensor in tensors.items() if "vision" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if "vision" not in name} == {torch.float16}
    done = convert("verify", "--hf", tmp_path / "llava-hf", "--checkpoint", tmp_path / "mixed", "--logits")
    assert done.returncode == 0 and "ids equal" in done.stdout, done.stdout + done.stderr
    export_model(tmp_path / "mixed", tmp_path / "one", layout="llava-hf", dtype="bf16")
    assert {tensor.dtype for tensor in read_safetensors(tmp_path / "one").values()} == {torch.bfloat16}
    assert "torch_dtype" not in json.loads((tmp_path / "one/config.json").read_text())["vision_config"]


def test_a_component_of_several_dtypes_keeps_them(tmp_path: Path) -> None:
    source = write_llava_hf(tmp_path / "hf", dtype="bf16")
    tensors = read_safetensors(source)
    norms = {
        name: tensor.float() for name, tensor in tensors.items() if "layernorm" in name or name.endswith("norm.weight")
    }
    write_weights(source, {**tensors, **norms})
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    export_model(tmp_path / "megatron", tmp_path / "back", layout="llava-hf")
    back = read_safetensors(tmp_path / "back")
    assert norms and all(
        back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
        for name, tensor in {**tensors, **norms}.items()
    )
    assert json.loads((tmp_path / "back/provenance.json").read_text())["dtype"]["language"] == "bf16"


def test_inspect(checkpoints: list[Path]) -> None:
    text = "\n".join(describe_checkpoint(checkpoints[0], hashes=False, every_layer=False))
    assert "source: llama: llama1, clip" in text and "optimizer: none (weights only)" in text
    assert "language.decoder.layers.*.mlp.linear_fc1.weight x 4: [128, 48] fp32" in text
    assert (
        "stored for exports, not computed: 18 tensors" in text
        and "vision: sha256" in text
        and "rope_theta: 10000.0" in text
    )
    assert "language.decoder.layers.3.mlp.linear_fc1.weight: [128, 48]" in "\n".join(
        describe_checkpoint(checkpoints[0], hashes=True, every_layer=True)
    )


def test_inspect_whose_output_is_closed(checkpoints: list[Path]) -> None:
    command = [sys.executable, "tools/convert.py", "inspect", str(checkpoints[0]), "--every-layer"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=100) == 141 and "Traceback" not in errors, errors


def test_prune(checkpoints: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints"
    for step in (5, 10, 15):
        shutil.copytree(checkpoints[0], run / f"step_{step:08d}")
    with pytest.raises(CheckpointError, match="--keep-last 0"):
        prune_checkpoints(tmp_path / "run", keep_last=0, keep_every_steps=0)
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        prune_checkpoints(tmp_path / "llama1", keep_last=1, keep_every_steps=0)
    removed = prune_checkpoints(tmp_path / "run", keep_last=1, keep_every_steps=10)
    assert [path.name for path in removed] == ["step_00000005"]
    assert sorted(path.name for path in run.iterdir()) == ["step_00000010", "step_00000015"]
