"""Image processors of every family: transformers' own are read, written ones are equal, other steps are refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_share4v.checkpoint.hf.image_processor import parse_image_processor, to_image_processor
from megatron_share4v.checkpoint.hf.vision_config import parse_vision_config
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.errors import ConversionError

HALVES = (0.5, 0.5, 0.5)
TOWERS = {
    "clip": {"model_type": "clip_vision_model"},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 384},
    "dinov2": {"model_type": "dinov2", "image_size": 518},
}


def _read_image(config: dict[str, Any], tower: str, *, is_trained: bool = True) -> VisionConfig:
    vision = parse_vision_config(TOWERS[tower], where="config.json")
    return parse_image_processor(config, vision, is_trained=is_trained, where="preprocessor_config.json")


@pytest.mark.parametrize(("tower", "name"), [("clip", "CLIP"), ("siglip", "Siglip"), ("dinov2", "Bit")])
def test_an_image_processor_of_transformers_is_read_and_written_back(tower: str, name: str) -> None:
    import transformers

    size = TOWERS[tower].get("image_size", 224)
    square = {"size": {"height": size, "width": size}}
    cropped = {"size": {"shortest_edge": size + 20}, "crop_size": {"height": size, "width": size}}
    reference = getattr(transformers, f"{name}ImageProcessorPil")(**(square if tower == "siglip" else cropped))
    described = reference.to_dict()
    vision = _read_image(described, tower)
    assert vision.resize_edge == (None if tower == "siglip" else size + 20)
    assert vision.resize == ("square" if tower == "siglip" else "shortest_edge")
    assert vision.image_mean == tuple(described["image_mean"])
    written = to_image_processor(vision, pads=False)
    assert written["image_processor_type"] == f"{name}ImageProcessor"
    for key in ("size", "crop_size", "resample", "image_mean", "image_std", "do_center_crop"):
        if described.get(key) is not None:
            wanted = list(described[key]) if key.startswith("image") else described[key]
            assert written[key] == wanted, key
    assert _read_image(written, tower) == vision


def test_image_processors_by_their_absent_keys() -> None:
    assert _read_image({"image_processor_type": "CLIPImageProcessor"}, "clip").resize_edge is None
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "image_mean": 0.5}
    assert _read_image(old, "clip").image_mean == HALVES
    bit = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 518}, "crop_size": 518}
    assert _read_image(bit, "dinov2").image_mean == VisionConfig().image_mean  # not DINOv2's, as in transformers
    bilinear = {"image_processor_type": "SiglipImageProcessorFast", "size": 384, "resample": 2}
    assert _read_image(bilinear, "siglip").resample == "bilinear"


def test_a_bare_tower_is_used_at_the_size_of_its_positions(caplog: pytest.LogCaptureFixture) -> None:
    """DINOv2's processor crops to 224, and its positions are those of 518."""
    described = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224}
    vision = _read_image(described, "dinov2", is_trained=False)
    assert (vision.image_size, vision.resize_edge, vision.resize) == (518, None, "shortest_edge")
    assert "224 x 224 pixels, the tower takes 518" in caplog.text
    with pytest.raises(ConversionError, match="resized positions are not supported"):
        _read_image(described, "dinov2")


def test_a_crop_of_the_resized_square_changes_nothing() -> None:
    square = {"height": 224, "width": 224}
    described = {"image_processor_type": "CLIPImageProcessor", "size": square, "do_center_crop": True}
    for crop in (square, 224):
        vision = _read_image({**described, "crop_size": crop}, "clip")
        assert (vision.resize, vision.resize_edge) == ("square", None)
    assert to_image_processor(vision, pads=False)["size"] == square


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "FooProcessor"}, "'FooProcessor' is not supported; supported are CLIP"),
        ({"rescale_factor": 0.5}, "rescale_factor 0.5 is not supported"),
        ({"do_normalize": False}, "do_normalize false"),
        ({"resample": 0}, "resample 0"),
        ({"do_center_crop": False}, "not square"),
        ({"size": {"height": 224, "width": 200}}, "neither a square"),
        ({"image_mean": [0.5, 0.5]}, "not three numbers"),
        ({"image_mean": [127, 127, 127]}, "image_mean.0: Input should be less than or equal to 1"),
        ({"image_std": [0, 0, 0]}, "image_std.0: Input should be greater than 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor '1/255' is not supported"),
        ({"do_resize": "false"}, "do_resize false is not supported"),
        ({"size": "224"}, "size is '224', not an integer"),
        ({"size": {"shortest_edge": "224"}}, "size: shortest_edge is '224', not an integer"),
        ({"size": {"shortest_edge": 200}}, "resize_edge 200 .* at least image_size 224"),
        ({"crop_size": {"height": 224}}, "crop_size .* is no square"),
        ({"resample": [3]}, r"resample \[3\] is not supported"),
    ],
)
def test_steps_that_are_not_built_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=f"preprocessor_config.json: .*{message}"):
        _read_image({"image_processor_type": "CLIPImageProcessor", **change}, "clip")
