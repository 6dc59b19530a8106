"""Read and write how images become pixels, from and to preprocessor_config.json or processor_config.json.

The classes of transformers differ in the values of absent keys; only those whose steps are built here are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_share4v.checkpoint.hf.families import CLIP_FAMILY, SIGLIP_FAMILY, TOWER_FAMILIES
from megatron_share4v.checkpoint.hf.source.reader import read_json
from megatron_share4v.checkpoint.hf.supported_keys import INTEGER, MAPPING, Json, describe_invalid, refuse_wrong_types
from megatron_share4v.config.base import ConflictError
from megatron_share4v.config.model import VisionConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
LLAVA_PROCESSOR = "LlavaImageProcessor"
"""The class that can pad an image to a square; it has CLIP's values otherwise."""
_CLIP = "CLIPImageProcessor"


@dataclass(frozen=True)
class _ProcessorClass:
    """transformers' values of absent keys: size, whether the centre is cropped, mean and deviation."""

    size: Mapping[str, int]
    crops: bool
    colours: Mapping[str, Any]


_CROPPED = _ProcessorClass({"shortest_edge": 224}, True, CLIP_FAMILY.image)
_CLASSES = {
    **dict.fromkeys((_CLIP, LLAVA_PROCESSOR, "BitImageProcessor"), _CROPPED),
    "SiglipImageProcessor": _ProcessorClass({"height": 224, "width": 224}, False, SIGLIP_FAMILY.image),
}
_OLD_NAMES = {"CLIPFeatureExtractor": _CLIP}
_RESAMPLE: dict[int, Literal["bicubic", "bilinear", "lanczos"]] = {
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}  # PIL.Image.Resampling
_RESCALE = 1 / 255


def find_image_processor(directory: Path) -> tuple[Path, Json] | None:
    """Return the file of `directory` that describes the image processor, and its content; None without one."""
    for name in (PREPROCESSOR, PROCESSOR):
        content = read_json(directory / name) if (directory / name).is_file() else {}
        content = content.get("image_processor") or ({} if name == PROCESSOR else content)
        if content:
            return directory / name, content
    return None


def parse_image_processor(config: Json, vision: VisionConfig, *, is_trained: bool, where: str) -> VisionConfig:
    """Return `vision` with the image processor's mean, deviation, filter and resize rule.

    is_trained: whether a LLaVA was trained with it, so that its size must be the tower's; a bare tower is used at the
    size for which it has positions, with a warning. Raises ConversionError naming a step that is not built.
    """
    try:
        return _parse(config, vision, is_trained=is_trained, where=where)
    except (ConflictError, TypeError, ValueError) as error:
        raise ConversionError(f"{where}: {describe_invalid(error)}") from error


def _parse(config: Json, vision: VisionConfig, *, is_trained: bool, where: str) -> VisionConfig:
    defaults = _class_of(config, vision, where)
    problems = list(_unsupported_steps(config))
    if problems:
        raise ConversionError(f"{where}: {'; '.join(problems)}")
    resample = config.get("resample", 3)
    if resample not in tuple(_RESAMPLE):
        raise ConversionError(f"{where}: resample {resample!r} is not supported; supported are {_RESAMPLE}")
    size = _pixels(config, "size", defaults.size, where)
    if isinstance(size, int):
        size = {"height": size, "width": size} if "height" in defaults.size else {"shortest_edge": size}
    crop = _crop_size(config, where) if config.get("do_center_crop", defaults.crops) else None
    edge, side = size.get("shortest_edge"), size.get("height")
    if edge is None and (side is None or side != size.get("width")):
        raise ConversionError(f"{where}: size {size} is neither a square nor a shortest_edge, which are supported")
    if edge is not None and crop is None:
        raise ConversionError(f"{where}: size {size} without do_center_crop gives pictures that are not square")
    if edge is None and crop not in (None, side):
        raise ConversionError(f"{where}: crop_size {crop} of pictures resized to {side} x {side} is not supported")
    result = side if crop is None else crop
    if result != vision.image_size:
        message = f"{where}: its pictures have {result} x {result} pixels, the tower takes {vision.image_size}"
        if is_trained:
            raise ConversionError(f"{message}; resized positions are not supported")
        get_logger().warning("%s: they are resized to that", message)
        edge = None
    return replace(
        vision,
        image_mean=_three(config, "image_mean", where) or defaults.colours["image_mean"],
        image_std=_three(config, "image_std", where) or defaults.colours["image_std"],
        resample=_RESAMPLE[resample],
        resize="square" if side is not None and edge is None else "shortest_edge",
        resize_edge=None if edge == vision.image_size else edge,
    )


def to_image_processor(vision: VisionConfig, *, pads: bool) -> dict[str, Any]:
    """Return the description of an image processor; pads: whether it pads a picture to a square first."""
    side, square = vision.image_size, vision.resize == "square"
    return {
        "image_processor_type": LLAVA_PROCESSOR if pads else TOWER_FAMILIES[vision.model_type].processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if square else {"shortest_edge": vision.resize_edge or side},
        "resample": next(number for number, name in _RESAMPLE.items() if name == vision.resample),
        "do_center_crop": not square,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": _RESCALE,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def _class_of(config: Json, vision: VisionConfig, where: str) -> _ProcessorClass:
    stated = config.get("image_processor_type") or config.get("feature_extractor_type")
    name = str(stated or TOWER_FAMILIES[vision.model_type].processor)
    for suffix in ("Fast", "Pil"):
        name = name.removesuffix(suffix)
    name = _OLD_NAMES.get(name, name)
    if name not in _CLASSES:
        raise ConversionError(
            f"{where}: image processor {stated!r} is not supported; supported are {', '.join(_CLASSES)}"
        )
    return _CLASSES[name]


def _unsupported_steps(config: Json) -> Iterator[str]:
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(key) not in (None, True):
            yield f"{key} {str(config[key]).lower()} is not supported"
    factor = config.get("rescale_factor")
    if factor is not None and not (isinstance(factor, float) and abs(factor - _RESCALE) < 1e-9):
        yield f"rescale_factor {factor!r} is not supported; supported is 1/255"


def _pixels(config: Json, key: str, default: Any, where: str) -> Any:
    """Return the number of pixels of `key`, or the mapping of them; null is as absent."""
    value = default if config.get(key) is None else config[key]
    refuse_wrong_types({key: value}, {key: INTEGER if not isinstance(value, Mapping) else MAPPING}, where)
    if isinstance(value, Mapping):
        refuse_wrong_types(value, dict.fromkeys(value, INTEGER), f"{where}: {key}")
    return value


def _crop_size(config: Json, where: str) -> int:
    crop = _pixels(config, "crop_size", 224, where)
    if isinstance(crop, int):
        return crop
    side = crop.get("height")
    if side is None or side != crop.get("width"):
        raise ConversionError(f"{where}: crop_size {crop} is no square, which is supported")
    return side


def _three(config: Json, key: str, where: str) -> tuple[float, float, float] | None:
    value = config.get(key)
    if value is None:
        return None
    values = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(values) != 3:
        raise ConversionError(f"{where}: {key} {value} is not three numbers")
    return values
