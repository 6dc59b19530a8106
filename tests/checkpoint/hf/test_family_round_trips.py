"""Every pair of tower and language model as transformers saves it: import, export bit for bit, read by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_fixtures import read_safetensors
from hf_pairs import IMAGE_SIZE, PAIRS, PROCESSORS, write_pair

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.checkpoint.hf.verify import verify_conversion

# One of each tower and of each language model; -m matrix runs all.
CHOSEN = ("clip x llama3", "siglip x qwen2 tied", "dinov2 x qwen2 untied", "siglip x qwen3", "dinov2 x mistral",
          "clip x vicuna")  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHOSEN else pytest.mark.matrix) for name in PAIRS]
)
def test_a_pair_survives_import_and_export(name: str, tmp_path: Path) -> None:
    import transformers

    reference = write_pair(tmp_path / "hf", name)
    source, converted, back = HfSource(directory=tmp_path / "hf"), tmp_path / "checkpoint", tmp_path / "back"
    import_model(source, converted, options=ImportOptions(template="vicuna_v1"))
    export_model(converted, back, layout="llava-hf")
    written, read = read_safetensors(tmp_path / "hf"), read_safetensors(back)
    tower = name.split(" x ")[0]
    inner = {} if tower == "dinov2" else {"vision_tower.": "vision_tower.vision_model."}
    for old, new in inner.items():  # transformers 5 leaves it out, older releases need it
        written = {key.replace(old, new): tensor for key, tensor in written.items()}
    assert set(read) == set(written)
    assert all(torch.equal(read[key], written[key]) for key in written)
    again, info = transformers.AutoModelForImageTextToText.from_pretrained(back, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    generator = torch.Generator().manual_seed(1)
    features = reference.config.image_seq_length + (reference.config.vision_feature_select_strategy == "full") * (
        tower != "siglip"
    )
    ids = torch.randint(3, 300, (1, 8 + features), generator=generator)
    ids[0, 2 : 2 + features] = reference.config.image_token_index
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    with torch.no_grad():
        expected, found = (m(input_ids=ids, pixel_values=pixels).logits for m in (reference, again.eval()))
    assert torch.equal(expected, found)
    for directory in (tmp_path / "hf", back):
        assert verify_conversion(HfSource(directory=directory), converted).unused > 0


def test_the_written_files_of_a_siglip_and_a_tied_model(tmp_path: Path) -> None:
    """What transformers 4, vLLM and the processor need to know."""
    write_pair(tmp_path / "hf", "siglip x qwen2 tied")
    import_model(
        HfSource(directory=tmp_path / "hf"), tmp_path / "checkpoint", options=ImportOptions(template="vicuna_v1")
    )
    export_model(tmp_path / "checkpoint", tmp_path / "back", layout="llava-hf")
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "back").glob("*config.json")}
    config = files["config.json"]
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    assert config["text_config"]["rope_theta"] == 1e6 and "rope_parameters" not in config["text_config"]
    assert config["vision_feature_select_strategy"] == "full" and config["image_seq_length"] == 4
    processor = files["processor_config.json"]
    assert (processor["num_additional_image_tokens"], processor["vision_feature_select_strategy"]) == (0, "full")
    image = files["preprocessor_config.json"]
    assert image["image_processor_type"] == "SiglipImageProcessor"
    for key in ("size", "resample", "image_mean", "image_std"):
        assert image[key] == PROCESSORS["siglip"][key]
