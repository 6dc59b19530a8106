"""Exports of damaged checkpoints and unsupported models are refused, and nothing is published."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_fixtures import MODEL, read_safetensors, write_clip, write_json, write_share4v, write_weights

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.verify import verify_conversion
from megatron_share4v.errors import CheckpointError, ConversionError

DOWN = "language_model.model.layers.2.mlp.down_proj.weight"


def test_damaged_checkpoints_are_not_exported(llava: Path, tmp_path: Path) -> None:
    megatron, target = tmp_path / "megatron", tmp_path / "out"
    import_model(HfSource(directory=llava), megatron, options=ImportOptions())
    target.mkdir()
    with pytest.raises(ConversionError, match="exists already"):
        export_model(megatron, target, layout="llava-hf")
    target.rmdir()
    data = megatron / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(CheckpointError, match="other content than was written|cannot be read"):
        export_model(megatron, target, layout="llava-hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]  # staged files are deleted
    data.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="__0_0.distcp has"):
        export_model(megatron, target, layout="llava-hf")
    data.write_bytes(whole)
    assert not target.exists()
    export_model(megatron, target, layout="llava-hf")
    before, after = read_safetensors(llava), read_safetensors(target)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        export_model(tmp_path / "nowhere", tmp_path / "out2", layout="llava-hf")


def test_interrupted_export_of_damaged_weights_is_not_reused(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files exported from damaged weights are in the journal; they must not be published after a repair."""
    from megatron_share4v.checkpoint.hf import exporter

    megatron, target = tmp_path / "megatron", tmp_path / "out"
    import_model(HfSource(directory=llava), megatron, options=ImportOptions())
    data = megatron / "__0_0.distcp"
    whole = bytearray(data.read_bytes())
    place = whole.find(read_safetensors(llava)[DOWN].numpy().tobytes())
    assert place > 0
    damaged = whole.copy()
    damaged[place] ^= 1

    def interrupted(path: Path, *, contents: bool) -> object:
        if contents:
            raise KeyboardInterrupt
        return checked(path, contents=contents)

    checked = exporter.verify_files
    status = data.stat()
    data.write_bytes(damaged)
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    monkeypatch.setattr(exporter, "verify_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(megatron, target, layout="llava-hf")
    assert (tmp_path / ".out.converting" / "model.safetensors").is_file()
    monkeypatch.setattr(exporter, "verify_files", checked)
    data.write_bytes(whole)
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))  # a copy tool preserves times
    export_model(megatron, target, layout="llava-hf")
    before, after = read_safetensors(llava), read_safetensors(target)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fp16_that_overflows(copy: Path, tmp_path: Path) -> None:
    tensors = read_safetensors(copy)
    tensors[DOWN][0, 0] = 1e6
    write_weights(copy, tensors)
    import_model(HfSource(directory=copy), tmp_path / "megatron", options=ImportOptions())
    with pytest.raises(ConversionError, match="down_proj.weight has values beyond fp16"):
        export_model(tmp_path / "megatron", tmp_path / "out", layout="llava-hf", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_llava_hf_has_no_linear_projector(tmp_path: Path) -> None:
    model = replace(MODEL, projector=replace(MODEL.projector, type="linear"))
    source = write_share4v(tmp_path / "s4v", model, inside=True)
    write_json(
        source / "vision_tower" / "config.json", json.loads((write_clip(tmp_path / "clip") / "config.json").read_text())
    )
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    with pytest.raises(ConversionError, match="no projector of model.projector.type linear"):
        export_model(tmp_path / "megatron", tmp_path / "out", layout="llava-hf")
    export_model(tmp_path / "megatron", tmp_path / "s4v2", layout="share4v")
    assert verify_conversion(HfSource(directory=tmp_path / "s4v2"), tmp_path / "megatron").rounded == 0
