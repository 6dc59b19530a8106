"""Hugging Face -> checkpoint -> Hugging Face and back are bitwise in fp32, bf16 and fp16, through any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import run_world
from hf_fixtures import (
    CLIP,
    MODEL,
    SHARE4V,
    random_hf_weights,
    read_safetensors,
    write_clip,
    write_llava_hf,
    write_share4v,
    write_tokenizer,
)

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.verify import verify_conversion
from megatron_share4v.checkpoint.manifest import RunState, hash_files, read_manifest, write_manifest
from megatron_share4v.config.model import LanguageConfig, VisionConfig

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_llava_hf_comes_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    source = write_llava_hf(tmp_path / "hf", dtype=dtype, shards=3)
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    export_model(tmp_path / "megatron", tmp_path / "back", layout="llava-hf", shard_bytes=100_000)
    assert equal(read_safetensors(source), read_safetensors(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    again = import_model(HfSource(directory=tmp_path / "back"), tmp_path / "again", options=ImportOptions())
    assert again.weights == read_manifest(tmp_path / "megatron").weights
    assert provenance(tmp_path / "back") == again.weights


def provenance(directory: Path) -> dict[str, str]:
    return json.loads((directory / "provenance.json").read_text())["weights"]


def test_an_export_states_the_hashes_of_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes in provenance.json equal an import's: rounded, with a manifest of the tower alone, and after a resume."""
    from megatron_share4v.checkpoint import resumable_writer
    from megatron_share4v.checkpoint.hf import exporter

    import_model(HfSource(directory=write_llava_hf(tmp_path / "hf")), tmp_path / "megatron", options=ImportOptions())
    manifest = read_manifest(tmp_path / "megatron")
    write_manifest(tmp_path / "megatron", replace(manifest, weights={"vision": manifest.weights["vision"]}))
    for dtype in ("fp32", "bf16"):
        options = {"layout": "llava-hf", "dtype": dtype, "shard_bytes": 100_000}
        whole, ended = resumable_writer._write, iter([False, False, True])
        monkeypatch.setattr(
            resumable_writer, "_write", lambda *arguments: whole(*arguments) if not next(ended) else exit()
        )
        with pytest.raises(SystemExit):
            export_model(tmp_path / "megatron", tmp_path / dtype, **options)
        monkeypatch.setattr(resumable_writer, "_write", whole)
        exporter.export_model(tmp_path / "megatron", tmp_path / dtype, **options)
        again = import_model(HfSource(directory=tmp_path / dtype), tmp_path / f"again_{dtype}", options=ImportOptions())
        assert provenance(tmp_path / dtype) == again.weights and len(again.weights) == 3
    assert again.weights.keys() == manifest.weights.keys() and again.weights != manifest.weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_share4v_comes_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    source, tower = write_share4v(tmp_path / "s4v", dtype=dtype), write_clip(tmp_path / "tower", dtype=dtype)
    request = HfSource(directory=source, tower=tower)
    megatron = import_model(request, tmp_path / "megatron", options=ImportOptions())
    export_model(tmp_path / "megatron", tmp_path / "back", layout="share4v")
    assert equal(
        read_safetensors(tmp_path / "back"), random_hf_weights(MODEL, SHARE4V, "projector", "language", dtype=dtype)
    )
    assert equal(read_safetensors(tmp_path / "back" / "clip"), random_hf_weights(MODEL, CLIP, "vision", dtype=dtype))
    again = import_model(HfSource(directory=tmp_path / "back"), tmp_path / "again", options=ImportOptions())
    assert again.weights == megatron.weights
    assert verify_conversion(HfSource(directory=tmp_path / "back"), tmp_path / "megatron").unused == 18


def trained_elsewhere(source: Path, target: Path, degrees: tuple[int, int]) -> None:
    """Load the checkpoint at a layout and write it from there, as a run that starts and saves."""
    from megatron_share4v.checkpoint.assets import asset_files
    from megatron_share4v.checkpoint.compatibility import stored_config
    from megatron_share4v.checkpoint.store import CheckpointContents, load_weights, write_checkpoint
    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.mcore.layer_config import DTYPES
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    tensor, pipeline = degrees
    manifest = read_manifest(source)
    config = stored_config(manifest, where=source)
    data = torch.distributed.get_world_size() // (tensor * pipeline)
    with open_mesh(Layout(tensor=tensor, pipeline=pipeline, data=data), device=Device("cpu")) as mesh:
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
        chunks = build_chunks(config.model, mesh=mesh, parallel=parallel, dtype=DTYPES[config.precision.dtype])
        load_weights(source, chunks=chunks)
        state, assets = RunState(step=0, consumed_samples=0, plan_fingerprint=""), asset_files(source)
        contents = CheckpointContents(
            chunks=chunks, optimizer=None, mesh=mesh, state=state, config_text=manifest.config, assets=assets
        )
        write_checkpoint(target, contents)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda degrees: f"tensor{degrees[0]}_pipeline{degrees[1]}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_through_every_layout(degrees: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    source = write_llava_hf(tmp_path / "hf", dtype=dtype)
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    run_world(degrees[0] * degrees[1], trained_elsewhere, tmp_path / "megatron", tmp_path / "there", degrees)
    report = verify_conversion(HfSource(directory=source), tmp_path / "there")
    assert (report.rounded, report.unused) == (0, 18)
    assert report.weights == read_manifest(tmp_path / "megatron").weights
    export_model(tmp_path / "there", tmp_path / "back", layout="llava-hf")
    assert equal(read_safetensors(source), read_safetensors(tmp_path / "back"))


def at_all_layouts(source: Path, target: Path) -> None:
    for number, degrees in enumerate(LAYOUTS):
        trained_elsewhere(source if number == 0 else target / f"{number - 1}", target / f"{number}", degrees)


def test_heads_of_7b_in_fp32_through_one_layout_after_the_other(tmp_path: Path) -> None:
    """Heads of 128 and 64 channels, the proportions of 7B and two blocks, one per pipeline stage."""
    vision = VisionConfig(image_size=28, hidden_size=256, intermediate_size=1024, num_layers=2, num_attention_heads=4)
    language = LanguageConfig(
        vocab_size=300,
        hidden_size=1024,
        intermediate_size=2752,
        num_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    source = write_llava_hf(tmp_path / "hf", replace(MODEL, vision=vision, language=language))
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    run_world(4, at_all_layouts, tmp_path / "megatron", tmp_path)
    weights = read_manifest(tmp_path / "megatron").weights
    assert all(read_manifest(tmp_path / f"{number}").weights == {"vision": weights["vision"]} for number in range(4))
    export_model(tmp_path / "3", tmp_path / "back", layout="llava-hf")
    assert equal(read_safetensors(source), read_safetensors(tmp_path / "back"))
    assert provenance(tmp_path / "back") == weights


def test_widths_of_7b(tmp_path: Path) -> None:
    """One block of tower and language model with the published widths, heads and patches, at tensor 2."""
    vision = VisionConfig(image_size=28, num_layers=2)
    model = replace(MODEL, vision=vision, language=LanguageConfig(vocab_size=300, num_layers=1))
    source = write_llava_hf(tmp_path / "hf", model, dtype="bf16")
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    run_world(2, trained_elsewhere, tmp_path / "megatron", tmp_path / "there", (2, 1))
    export_model(tmp_path / "there", tmp_path / "back", layout="llava-hf")
    assert equal(read_safetensors(source), read_safetensors(tmp_path / "back"))


def test_dtype_is_rounded_once_and_noticed(tmp_path: Path) -> None:
    source = write_llava_hf(tmp_path / "hf")
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions(dtype="bf16"))
    export_model(tmp_path / "megatron", tmp_path / "back", layout="llava-hf")
    before, after = read_safetensors(source), read_safetensors(tmp_path / "back")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert verify_conversion(HfSource(directory=source), tmp_path / "megatron").rounded == 72
    export_model(tmp_path / "megatron", tmp_path / "wide", layout="llava-hf", dtype="fp32")
    assert all(torch.equal(after[name].float(), tensor) for name, tensor in read_safetensors(tmp_path / "wide").items())


def test_a_trained_model_gets_mean_rows_and_an_old_one_without_assets_fresh_blocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_model(HfSource(directory=write_llava_hf(tmp_path / "hf")), tmp_path / "megatron", options=ImportOptions())
    (tmp_path / "megatron" / "unused.safetensors").unlink()
    manifest = read_manifest(tmp_path / "megatron")
    state = RunState(step=3, consumed_samples=9, plan_fingerprint="")
    write_manifest(tmp_path / "megatron", replace(manifest, state=state, files=hash_files(tmp_path / "megatron")))
    with caplog.at_level("WARNING", logger="megatron_share4v"):
        export_model(tmp_path / "megatron", tmp_path / "back", layout="llava-hf")
    assert "18 tensors after its feature layer" in caplog.text and "freshly initialised" in caplog.text
    weights = read_safetensors(tmp_path / "back")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows = weights[name]
        assert rows.shape[0] == 320
        assert torch.equal(rows[300:], rows[:300].mean(0, keepdim=True).expand(20, -1))
    assert torch.equal(weights["vision_tower.vision_model.post_layernorm.weight"], torch.ones(32))
    assert json.loads((tmp_path / "back" / "provenance.json").read_text())["step"] == 3


def test_tokenizer_travels(tmp_path: Path) -> None:
    source = write_llava_hf(tmp_path / "hf")
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    expected = write_tokenizer(tmp_path / "tokenizer.model").read_bytes()
    assert (tmp_path / "megatron" / "tokenizer.model").read_bytes() == expected
    export_model(tmp_path / "megatron", tmp_path / "back", layout="share4v")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == expected
