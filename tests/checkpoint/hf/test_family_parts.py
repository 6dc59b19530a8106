"""Models of every family from their parts, and what their files may lack or repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_fixtures import read_safetensors, write_json, write_tokenizer, write_weights
from hf_pairs import IMAGE_SIZE, PROCESSORS, ROWS, build_pair, write_pair

from megatron_share4v.checkpoint.hf.exporter import export_model, open_checkpoint
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfModel, HfSource, open_hf_model
from megatron_share4v.checkpoint.hf.verify import verify_conversion
from megatron_share4v.errors import ConversionError
from megatron_share4v.evaluate.agreement import compare_single_process, generated_questions

VICUNA = ImportOptions(template="vicuna_v1")


def _write_parts(root: Path, name: str) -> HfSource:
    """Write the language model, the tower and the projector of a pair as separate downloads."""
    model, tower = build_pair(name), name.split(" x ")[0]
    whole = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    language = {key.replace("language_model.", ""): t for key, t in whole.items() if key.startswith("model.language")}
    tied = model.config.text_config.tie_word_embeddings
    write_weights(root / "language", language if tied else {**language, "lm_head.weight": whole["lm_head.weight"]})
    write_json(root / "language" / "config.json", model.config.text_config.to_dict())
    write_tokenizer(root / "language" / "tokenizer.model")
    model.model.vision_tower.save_pretrained(root / "tower")
    write_json(root / "tower" / "preprocessor_config.json", PROCESSORS[tower])
    projector = {
        f"model.mm_projector.{2 * (number - 1)}.{part}": whole[f"model.multi_modal_projector.linear_{number}.{part}"]
        for number in (1, 2)
        for part in ("weight", "bias")
    }
    torch.save(projector, root / "mm_projector.bin")
    return HfSource(directory=root / "language", tower=root / "tower", projector=root / "mm_projector.bin")


@pytest.mark.parametrize("name", ["siglip x qwen2 tied", "dinov2 x llama3", "clip x mistral", "siglip x qwen3"])
def test_parts_make_the_model_that_they_come_from(name: str, tmp_path: Path) -> None:
    """Names of transformers' classes and files; the vocabulary keeps the rows of the language model."""
    parts = open_hf_model(_write_parts(tmp_path, name))
    whole = open_hf_model(HfSource(directory=_written(tmp_path / "whole", name)))
    assert parts.config.language.vocab_size == ROWS and whole.config.language.vocab_size == 300
    assert (parts.config.vision.resize, parts.config.vision.image_mean) == (
        whole.config.vision.resize,
        whole.config.vision.image_mean,
    )
    values, expected = _megatron(parts), _megatron(whole)
    assert values.keys() == expected.keys()
    for key, tensor in expected.items():
        rows = slice(300 if key in ("language.embedding.weight", "language.head.weight") else None)
        assert torch.equal(values[key][rows], tensor[rows]), key
    assert parts.unused().keys() == whole.unused().keys()


def test_a_missing_projector_is_initialised_for_every_family(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = _write_parts(tmp_path, "siglip x qwen3")
    import_model(HfSource(directory=source.directory, tower=source.tower), tmp_path / "checkpoint", options=VICUNA)
    assert "freshly initialised" in caplog.text
    assert open_checkpoint(tmp_path / "checkpoint").weights["projector.mlp.linear_fc1.weight"].shape == (48, 32)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_depth_of_a_projector_is_that_of_its_file(depth: int, tmp_path: Path) -> None:
    source = _write_parts(tmp_path, "clip x vicuna")
    weights = {
        f"model.mm_projector.{2 * number}.{part}": torch.randn(
            *((48, 48 if number else 32) if part == "weight" else (48,))
        )
        for number in range(depth)
        for part in ("weight", "bias")
    }
    torch.save(weights, tmp_path / "mm_projector.bin")
    assert open_hf_model(source).config.projector.type == f"mlp{depth}x_gelu"


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path: Path) -> None:
    source = _written(tmp_path / "hf", "clip x qwen2 tied")
    tensors = read_safetensors(source)
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    assert head not in tensors
    write_weights(source, {**tensors, head: tensors[embedding].clone()})
    assert "language.head.weight" not in _megatron(open_hf_model(HfSource(directory=source)))
    other = tensors[embedding].clone()
    other[7, 3] += 1
    write_weights(source, {**tensors, head: other})
    with pytest.raises(ConversionError, match="tie_word_embeddings true, but .*lm_head.weight differs"):
        open_hf_model(HfSource(directory=source))


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    source = _written(tmp_path / "hf", "clip x vicuna")
    tensors = read_safetensors(source)
    del tensors["language_model.lm_head.weight"]
    write_weights(source, tensors)
    with pytest.raises(ConversionError, match="missing tensor: lm_head.weight, and config.json does not state tie"):
        open_hf_model(HfSource(directory=source))


def test_a_siglip_without_its_pooling_head_is_exported_without(tmp_path: Path) -> None:
    source = _written(tmp_path / "hf", "siglip x mistral")
    tensors = {key: tensor for key, tensor in read_safetensors(source).items() if ".head." not in key}
    write_weights(source, tensors)
    import_model(HfSource(directory=source), tmp_path / "checkpoint", options=VICUNA)
    export_model(tmp_path / "checkpoint", tmp_path / "back", layout="llava-hf")
    assert not [key for key in read_safetensors(tmp_path / "back") if ".head." in key]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["vision_config"]["vision_use_head"] is False


def test_a_vocabulary_with_spare_rows_keeps_them(tmp_path: Path) -> None:
    """Qwen has more rows than the layout would add for <image> and <pad>."""
    source = _written(tmp_path / "hf", "siglip x qwen2 untied")
    tensors = read_safetensors(source)
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.randn(192, 48)])
    write_weights(source, tensors)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["vocab_size"] = ROWS + 192
    write_json(source / "config.json", config)
    model = open_hf_model(HfSource(directory=source))
    assert model.config.language.vocab_size == ROWS + 192 and not model.added_rows


@pytest.mark.parametrize("name", ["siglip x qwen2 tied", "clip x vicuna"])
def test_an_export_of_parts_with_spare_rows_is_the_same_model_again(name: str, tmp_path: Path) -> None:
    """20 spare rows: as many as the layout would add to 300 tokens, so that only the export's own file tells."""
    import_model(_write_parts(tmp_path, name), tmp_path / "checkpoint", options=VICUNA)
    export_model(tmp_path / "checkpoint", tmp_path / "back", layout="llava-hf")
    tensors = read_safetensors(tmp_path / "back")
    assert tensors["language_model.model.embed_tokens.weight"].shape[0] == ROWS
    assert json.loads((tmp_path / "back" / "config.json").read_text())["image_token_index"] == 300
    assert verify_conversion(HfSource(directory=tmp_path / "back"), tmp_path / "checkpoint").added == 0


@pytest.mark.parametrize(
    ("name", "aspect"), [("siglip x llama3", "pad"), ("dinov2 x qwen3", "square"), ("clip x qwen2 tied", "pad"),
                         ("siglip x mistral", "square")]
)  # fmt: skip
def test_greedy_answers_and_pixels_equal_transformers(name: str, aspect: str, tmp_path: Path) -> None:
    source = _written(tmp_path / "hf", name)
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "image_aspect_ratio": aspect})
    import_model(HfSource(directory=source), tmp_path / "checkpoint", options=VICUNA)
    export_model(tmp_path / "checkpoint", tmp_path / "back", layout="llava-hf")
    found = compare_single_process(tmp_path / "checkpoint", tmp_path / "back", questions=generated_questions())
    assert found.holds_with_text, str(found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("siglip x vicuna", "model.vision.model_type siglip_vision_model"),
        ("clip x llama3", "model.language.rope_scaling"),
        ("clip x qwen2 tied", "model.language.model_type qwen2"),
        ("dinov2 x qwen3", "model.language.model_type qwen3"),
    ],
)
def test_the_official_layout_is_for_llama_with_clip(name: str, message: str, tmp_path: Path) -> None:
    import_model(HfSource(directory=_written(tmp_path / "hf", name)), tmp_path / "checkpoint", options=VICUNA)
    with pytest.raises(ConversionError, match=f"share4v cannot express .*{message}.*use the layout llava-hf"):
        export_model(tmp_path / "checkpoint", tmp_path / "back", layout="share4v")
    assert not (tmp_path / "back").exists()


def test_a_llava_was_trained_at_the_size_of_its_pictures(tmp_path: Path) -> None:
    source = _written(tmp_path / "hf", "siglip x qwen3")
    size = {"height": IMAGE_SIZE + 14, "width": IMAGE_SIZE + 14}
    write_json(source / "preprocessor_config.json", {**PROCESSORS["siglip"], "size": size})
    with pytest.raises(ConversionError, match="44 x 44 pixels, the tower takes 30"):
        open_hf_model(HfSource(directory=source))


def _written(directory: Path, name: str) -> Path:
    write_pair(directory, name)
    return directory


def _megatron(model: HfModel) -> dict[str, Any]:
    from megatron_share4v.checkpoint.hf.importer import megatron_tensors

    return {name: tensor.read() for name, tensor in megatron_tensors(model, seed=0).items()}
