"""Verification reports the first difference between a model and a checkpoint, its likely cause, and missing tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_fixtures import read_safetensors, write_json, write_llava_hf, write_share4v, write_weights

from megatron_share4v.checkpoint.assets import asset_files
from megatron_share4v.checkpoint.hf import verify as verify_module
from megatron_share4v.checkpoint.hf.exporter import export_model, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model, write_weights_checkpoint
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.verify import verify_conversion
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor
from megatron_share4v.checkpoint.resumable_writer import stage_directory
from megatron_share4v.errors import ConversionError

Change = Callable[[dict[str, torch.Tensor]], None]
EMBEDDING, CLASS = "language_model.model.embed_tokens.weight", "vision_tower.vision_model.embeddings.class_embedding"
DOWN = "language_model.model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_hf(tmp_path_factory.mktemp("llava") / "hf")


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava, tmp_path / "hf"))


def remade(
    checkpoint: Path,
    target: Path,
    change: Callable[[dict[str, LazyTensor]], object],
    *,
    step: int = 0,
    assets: bool = True,
) -> Path:
    """Rewrite a checkpoint with changed tensors, or with the step of a trained one."""
    opened = open_checkpoint(checkpoint)
    megatron = dict(opened.weights)
    change(megatron)
    with stage_directory(target, fingerprint="remade") as staging:

        def copy_assets() -> None:
            for path in asset_files(opened.path):
                if assets or path.suffix == ".model":
                    shutil.copy(path, staging.path)

        state = replace(opened.manifest.state, step=step)
        write_weights_checkpoint(
            staging, megatron, config=opened.config, state=state, source="", write_assets=copy_assets
        )
    return target


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def _rope_permuted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1, 2, 6, 48).transpose(1, 2).reshape(tensor.shape)


def _both(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight")) and name.startswith("language"):
                tensors[name] = change(tensors[name]).contiguous()

    return apply


def _all_of(prefix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update(
        {name: change(tensor) for name, tensor in tensors.items() if name.startswith(prefix)}
    )


CAUSES: dict[str, tuple[Change, str]] = {
    "nothing": (lambda tensors: None, ""),
    "rope permutation": (_both(_rope_permuted), "rope permutation"),
    "wrong tower": (_all_of("vision_tower.", lambda tensor: tensor * 1.5), "wrong tower"),
    "vocabulary padding": (
        _set(EMBEDDING, lambda tensor: torch.cat([tensor[:299], tensor[300:], tensor[:1]])),
        "vocabulary padding",
    ),
    "other projector": (_all_of("multi_modal_projector.", lambda tensor: tensor + 1), "another projector"),
    "rounding": (_all_of("language_model.model.layers", lambda tensor: tensor.bfloat16().float()), "rounding"),
    "further training": (_all_of("", lambda tensor: tensor + 0.5), "other weights"),
    "zero is not minus zero": (_set(DOWN, lambda tensor: tensor.index_fill(0, torch.tensor([0]), -0.0)), DOWN),
}


@pytest.mark.parametrize("case", CAUSES)
def test_verify_names_the_first_difference_and_its_likely_cause(case: str, copy: Path, tmp_path: Path) -> None:
    change, words = CAUSES[case]
    tensors = read_safetensors(copy)
    if case == "zero is not minus zero":
        tensors[DOWN][0] = 0.0
        write_weights(copy, tensors)
    import_model(HfSource(directory=copy), tmp_path / "megatron", options=ImportOptions())
    change(tensors)
    write_weights(copy, tensors)
    if case == "nothing":
        assert verify_conversion(HfSource(directory=copy), tmp_path / "megatron").tensors == 72
        return
    with pytest.raises(ConversionError) as caught:
        verify_conversion(HfSource(directory=copy), tmp_path / "megatron")
    assert words in str(caught.value) and "first at [" in str(caught.value), caught.value


def test_verify_needs_the_same_model(copy: Path, tmp_path: Path) -> None:
    import_model(HfSource(directory=copy), tmp_path / "megatron", options=ImportOptions())
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", {**config, "text_config": {**config["text_config"], "rope_theta": 5e5}})
    with pytest.raises(ConversionError, match=r"another model: language.rope_theta 500000.0 there, 10000.0"):
        verify_conversion(HfSource(directory=copy), tmp_path / "megatron")


def test_a_class_token_of_zeros(copy: Path, tmp_path: Path) -> None:
    tensors = read_safetensors(copy)
    write_weights(copy, {**tensors, CLASS: torch.zeros(32)})
    import_model(HfSource(directory=copy), tmp_path / "megatron", options=ImportOptions())
    write_weights(copy, tensors)
    with pytest.raises(ConversionError, match="missing class token"):
        verify_conversion(HfSource(directory=copy), tmp_path / "megatron")


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, torch.float32, "", lambda: torch.zeros(shape))


NAMES: dict[str, tuple[Callable[[dict[str, LazyTensor]], object], str]] = {
    "missing": (
        lambda megatron: megatron.pop("vision.pre_layernorm.bias"),
        r"missing: vision.pre_layernorm.bias, of shape \(32,\)",
    ),
    "extra": (
        lambda megatron: megatron.update({"vision.layers.9.x": _zeros((2,))}),
        r"unexpected: vision.layers.9.x: no tensor of the model",
    ),
    "shape": (
        lambda megatron: megatron.update({"vision.class_embedding": _zeros((31,))}),
        r"wrong shape: vision.class_embedding is \(31,\).* asks for \(32,\)",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_and_shapes_on_our_side(case: str, llava: Path, tmp_path: Path) -> None:
    change, words = NAMES[case]
    import_model(HfSource(directory=llava), tmp_path / "megatron", options=ImportOptions())
    remade(tmp_path / "megatron", tmp_path / "other", change)
    with pytest.raises(ConversionError, match=words):
        verify_conversion(HfSource(directory=llava), tmp_path / "other")


@pytest.mark.parametrize(
    ("hf_weights", "megatron"), [("fp16", "bf16"), ("bf16", "fp16"), ("fp32", "fp16"), ("fp16", "fp32")]
)
def test_rounding_between_dtypes_is_no_difference(hf_weights: str, megatron: str, tmp_path: Path) -> None:
    """bf16 and fp16 have equally many bits; a tiny bf16 value has no counterpart in fp16."""
    source = write_llava_hf(tmp_path / "hf", dtype=hf_weights)
    tensors = read_safetensors(source)
    tensors[DOWN].view(-1)[:2] = torch.tensor([1e-30, 6e-8]).to(tensors[DOWN].dtype)
    write_weights(source, tensors)
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions(dtype=megatron))
    found = verify_conversion(HfSource(directory=source), tmp_path / "megatron")
    assert found.rounded == found.tensors == 72 and found.unused == 18 and found.added == 2
    tensors[DOWN].view(-1)[7] *= 1.05
    write_weights(source, tensors)
    with pytest.raises(ConversionError, match=r"linear_fc2.weight .*: 1 of 3072 values differ.* first at \[0, 7\]"):
        verify_conversion(HfSource(directory=source), tmp_path / "megatron")


def test_rows_after_the_vocabulary(copy: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    import_model(HfSource(directory=copy), megatron, options=ImportOptions())
    assert "rows after the vocabulary: equal to an export's, in 2 tensors" in str(
        verify_conversion(HfSource(directory=copy), megatron)
    )
    trained = remade(megatron, tmp_path / "trained", lambda tensors: None, step=3)
    with pytest.raises(
        ConversionError, match="embedding: its 20 rows after the vocabulary are not the mean of the others"
    ):
        verify_conversion(HfSource(directory=copy), trained)
    export_model(trained, tmp_path / "back", layout="llava-hf", dtype="bf16")
    assert verify_conversion(HfSource(directory=tmp_path / "back"), trained).added == 2
    tensors = read_safetensors(copy)
    tensors[EMBEDDING][310] += 1
    write_weights(copy, tensors)
    with pytest.raises(
        ConversionError,
        match="(?s)differ in 1 tensors.*embedding: its 20 rows after the vocabulary are not the imported ones",
    ):
        verify_conversion(HfSource(directory=copy), megatron)


def test_unused_weights_that_are_not_stored_are_reported(llava: Path, tmp_path: Path) -> None:
    import_model(HfSource(directory=llava), tmp_path / "megatron", options=ImportOptions())
    bare = remade(tmp_path / "megatron", tmp_path / "bare", lambda tensors: None, step=1, assets=False)
    export_model(bare, tmp_path / "back", layout="share4v")
    found = verify_conversion(HfSource(directory=tmp_path / "back"), bare)
    assert found.unused == 0 and len(found.not_stored) == 18
    assert "does not store; exports get freshly initialised ones: " in str(found) and "post_layernorm.weight" in str(
        found
    )


def test_differences_are_counted_chunk_by_chunk(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_model(HfSource(directory=copy), tmp_path / "megatron", options=ImportOptions())
    tensors = read_safetensors(copy)
    flat = tensors[DOWN].view(-1)
    flat[1000], flat[2001], flat[3071] = flat[1000] + 1, flat[2001] + 2, flat[3071] - 4
    write_weights(copy, tensors)
    messages = set()
    for chunk in (1 << 22, 7, 1000):
        monkeypatch.setattr(verify_module, "CHUNK", chunk)
        with pytest.raises(
            ConversionError, match=r"3 of 3072 values differ, by up to 4; first at \[15, 40\]"
        ) as caught:
            verify_conversion(HfSource(directory=copy), tmp_path / "megatron")
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_verify_of_a_released_model(tmp_path: Path) -> None:
    """Without rows after the vocabulary the summary does not mention them."""
    source = write_share4v(tmp_path / "s4v", inside=True)
    import_model(HfSource(directory=source), tmp_path / "megatron", options=ImportOptions())
    found = verify_conversion(HfSource(directory=source), tmp_path / "megatron")
    assert found.added == 0 and found.not_stored == () and "rows after" not in str(found)
