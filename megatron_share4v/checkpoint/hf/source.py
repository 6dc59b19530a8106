"""A model of another layout, found and described: its configuration, its tensors by their own names, its tokenizer. Nothing is read yet.

Accepts transformers' LLaVA, ShareGPT4V/LLaVA originals with the tower inside or beside them, and parts: a CLIP tower, a LLaMA, a projector;
also a LoRA adapter, delta weights or a projector on top of a base model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_share4v.checkpoint.hf.adapters import is_adapter, merge_delta, merge_lora
from megatron_share4v.checkpoint.hf.config import HfConfig, parse_model_config, parse_vision_config
from megatron_share4v.checkpoint.hf.naming import DECODER, HEAD, TOWER, detect_naming, present_components
from megatron_share4v.checkpoint.hf.reader import has_weights, open_weights_directory, open_weights_file, read_json
from megatron_share4v.checkpoint.hf.weight_map import (
    COMPONENTS,
    LLAVA_HF,
    SHARE4V,
    Component,
    Naming,
    WeightMapping,
    check_hf_weights,
    ignored_weights,
)
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, check_float_dtypes, merge_disjoint
from megatron_share4v.config.model import ModelConfig, VisionConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.tokenizer import Tokenizer

CONFIG, PREPROCESSOR, TOKENIZER, PROJECTOR = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.model",
    "mm_projector.bin",
)
TOWER_FOLDERS = ("clip", "vision_tower")
CLIP_HEAD = 64
CLIP_TEXT = ("text_model.", "text_projection", "visual_projection", "logit_scale")


@dataclass(frozen=True, kw_only=True)
class HfSource:
    """Where to look. Only `directory` is needed when all of a model is in it."""

    directory: Path
    base: Path | None = None
    """The model that `directory` is a LoRA adapter, a delta or a projector for."""
    delta: bool = False
    """`directory` holds delta weights."""
    tower: Path | None = None
    projector: Path | None = None
    tokenizer: Path | None = None
    any_tower: bool = False
    """Take `tower` although the configuration names another one."""


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model of another layout."""

    config: ModelConfig
    naming: Naming
    mappings: tuple[WeightMapping, ...]
    """Of the parts that are there; without a projector it is to be initialised."""
    tensors: dict[str, LazyTensor]
    """By their names; embedding and head have the tokenizer's rows and no more."""
    added_rows: dict[str, LazyTensor]
    """`embedding` and `head`: the rows after those, which llava-hf adds for its own tokens and for alignment."""
    tokenizer: Path
    image_aspect_ratio: str
    directories: tuple[Path, ...]

    @property
    def has_projector(self) -> bool:
        """Whether the projector is among the rows."""
        return any(mapping.name.startswith("projector.") for mapping in self.mappings)

    def unused(self) -> dict[str, LazyTensor]:
        """Weights of the tower that we do not compute, by CLIP's names."""
        kept = [
            drop for drop in ignored_weights(self.config, naming=self.naming, components=("vision",)) if drop.weights
        ]
        prefix = self.naming.tower or ""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if any(drop.covers(name) for drop in kept)
        }


def open_hf_model(request: HfSource) -> HfModel:
    """The model that `request` describes. Raises ConversionError naming the tensor, key or file that is missing, foreign or there twice."""
    if not request.directory.is_dir():
        raise ConversionError(f"{request.directory}: there is no such directory; give the directory of a model")
    config_path = _config_path(request)
    config = parse_model_config(read_json(config_path), where=str(config_path))
    if config.kind == "llava-hf" and request.tower is not None:
        raise ConversionError(
            f"two towers: {request.directory} is llava-hf, which has one among its weights, and {request.tower}; leave --tower out"
        )
    tensors = _with_projector(_main_tensors(request), request)
    tower_folder = None if config.kind == "llava-hf" else _tower_folder(request, config, tensors)
    vision = config.model.vision
    if tower_folder is not None:
        described = read_json(tower_folder / CONFIG)
        vision = parse_vision_config(described, feature_layer=vision.feature_layer, where=str(tower_folder / CONFIG))
        if has_weights(tower_folder):
            tower = open_weights_directory(tower_folder)
            # A whole CLIP model: its text half is of no use here.
            tensors = merge_disjoint(
                tensors, {name: tensor for name, tensor in tower.items() if not name.startswith(CLIP_TEXT)}
            )
    naming = detect_naming(tensors, title=config.kind)
    if tower_folder is None and config.kind != "llava-hf" and naming.tower is not None:
        vision = _vision_from_shapes(vision, naming.tower, tensors)
    components = _components(naming, config, request)
    tokenizer = _tokenizer(request)
    model = replace(
        config.model, vision=vision, projector=replace(config.model.projector, type=_projector_type(config, naming))
    )
    model, tensors, added = _cut_vocabulary(
        model, tensors, naming, config=config, pieces=Tokenizer(tokenizer).vocab_size
    )
    mappings = check_hf_weights(tensors, model, naming=naming, components=components)
    check_float_dtypes({name: tensors[name] for mapping in mappings for name in mapping.hf_names})
    _check_equal_dtypes(mappings, tensors)
    return HfModel(
        config=model,
        naming=naming,
        mappings=mappings,
        tensors=tensors,
        added_rows=added,
        tokenizer=tokenizer,
        image_aspect_ratio=config.image_aspect_ratio or _aspect_of_processor(request.directory),
        directories=tuple(
            path for path in (request.directory, request.base, tower_folder, request.projector) if path is not None
        ),
    )


def _config_path(request: HfSource) -> Path:
    for directory in (request.directory, request.base):
        if directory is not None and (directory / CONFIG).is_file():
            return directory / CONFIG
    raise ConversionError(f"{request.directory / CONFIG}: missing; give the directory of a model, with its config.json")


def _main_tensors(request: HfSource) -> dict[str, LazyTensor]:
    directory, base = request.directory, request.base
    adapter = is_adapter(directory)
    alone = not adapter and not has_weights(directory) and (directory / PROJECTOR).is_file()
    if request.delta and (adapter or alone):
        what = "a LoRA adapter" if adapter else "a projector alone"
        raise ConversionError(f"{directory}: is {what}, no delta weights; leave --delta out")
    if base is None:
        if adapter or alone or request.delta:
            what = "a LoRA adapter" if adapter else "a projector alone" if alone else "delta weights"
            raise ConversionError(f"{directory}: is {what}; give the model that it belongs to with --base")
        return open_weights_directory(directory)
    if adapter:
        return merge_lora(open_weights_directory(base), directory)
    if request.delta:
        return merge_delta(open_weights_directory(base), open_weights_directory(directory))
    if alone:
        return merge_disjoint(open_weights_directory(base), open_weights_file(directory / PROJECTOR))
    raise ConversionError(f"{directory}: is a whole model, so --base {base} has no use; leave it out, or say --delta")


def _with_projector(tensors: dict[str, LazyTensor], request: HfSource) -> dict[str, LazyTensor]:
    if request.projector is None:
        return tensors
    projector = open_weights_file(request.projector)
    strangers = [name for name in projector if "mm_projector" not in name]
    if strangers:
        raise ConversionError(
            f"{request.projector}: unexpected tensor: {strangers[0]}; give a projector's file (mm_projector.bin)"
        )
    return merge_disjoint(tensors, projector)


def _tower_folder(request: HfSource, config: HfConfig, tensors: dict[str, LazyTensor]) -> Path | None:
    """Where the tower's config.json is, and its weights unless they are among `tensors`."""
    inside = next((name for name in tensors if name.endswith(TOWER)), None)
    beside = [request.directory / name for name in TOWER_FOLDERS]
    named = []
    if config.tower is not None:
        named = [
            Path(config.tower),
            request.directory / config.tower,
            request.directory.parent / Path(config.tower).name,
        ]
        if (request.directory / config.tower / CONFIG).is_file():  # certain; the others are guesses
            named = [request.directory / config.tower]
    if request.tower is not None:
        known = any(request.tower.resolve() == path.resolve() for path in named)
        if config.tower and not request.any_tower and not known and request.tower.name != Path(config.tower).name:
            raise ConversionError(
                f"{request.tower}: another tower than {request.directory / CONFIG} says, which was trained with {config.tower}; give that one, "
                "or say --any-tower to take this one all the same"
            )
        candidates = [request.tower]
    else:
        candidates = [*beside, *named]
    folders = [path for path in candidates if (path / CONFIG).is_file()]
    full = [path for path in folders if has_weights(path)]
    if request.tower is not None and not folders:
        raise ConversionError(f"{request.tower}: is no tower (no {CONFIG}); give the directory of a CLIPVisionModel")
    if inside is not None and full:
        raise ConversionError(
            f"two towers: {inside} inside {request.directory}, and another in {full[0]}; leave one of them out"
        )
    distinct = list({path.resolve(): path for path in full}.values())
    if request.tower is None and len(distinct) > 1:
        raise ConversionError(f"two towers: in {distinct[0]} and in {distinct[1]}; say which one with --tower")
    if inside is None and not full:
        named_as = f" ({CONFIG} names {config.tower})" if config.tower else ""
        raise ConversionError(
            f"{request.directory}: missing tensor: {TOWER}: has no vision tower{named_as}; give its directory with --tower"
        )
    return full[0] if inside is None else folders[0] if folders else None


def _vision_from_shapes(vision: VisionConfig, prefix: str, tensors: dict[str, LazyTensor]) -> VisionConfig:
    """A tower inside a model whose configuration does not describe it. Only the number of heads cannot be seen; CLIP's heads have 64 channels."""

    def shape(name: str) -> tuple[int, ...]:
        if f"{prefix}{name}" not in tensors:
            raise ConversionError(f"missing tensor: {prefix}{name}")
        return tensors[f"{prefix}{name}"].shape

    width, patch = shape(TOWER)[0], shape("embeddings.patch_embedding.weight")[-1]
    side = round((shape("embeddings.position_embedding.weight")[0] - 1) ** 0.5)
    layers = sum(
        name.startswith(f"{prefix}encoder.layers.") and name.endswith("layer_norm1.weight") for name in tensors
    )
    heads = max(1, width // CLIP_HEAD)
    get_logger().info(
        "tower inside, without configuration: %d layers of width %d seen, %d heads assumed (64 channels each)",
        layers,
        width,
        heads,
    )
    return replace(
        vision,
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_layers=layers,
        num_attention_heads=heads,
    )


def _components(naming: Naming, config: HfConfig, request: HfSource) -> tuple[Component, ...]:
    there = present_components(naming)
    if naming.decoder is None:
        raise ConversionError(
            f"{request.directory}: missing tensor: {DECODER}: has no language model; give its directory"
        )
    if naming.head is None:
        raise ConversionError(
            f"{request.directory}: missing tensor: {HEAD}; models whose head is their embedding are not computed here"
        )
    if naming.tower is None:
        raise ConversionError(f"{request.directory}: missing tensor: {TOWER}: has no vision tower")
    # A stage-1 start may lack the projector; a model that was trained may not.
    if config.kind == "llama":
        return there
    layout = LLAVA_HF if config.kind == "llava-hf" else SHARE4V
    linear = config.model.projector.type == "linear"
    if (naming.projector_linear if linear else naming.projector_mlp) is None:
        prefix = layout.projector_linear if linear else (layout.projector_mlp or ("",))[0]
        raise ConversionError(
            f"{request.directory}: missing tensor: {prefix}weight: has no projector ({config.model.projector.type}); copy it again"
        )
    return COMPONENTS


def _projector_type(config: HfConfig, naming: Naming) -> str:
    if config.kind == "llama" and naming.projector_linear is not None:
        return "linear"
    return config.model.projector.type


def _tokenizer(request: HfSource) -> Path:
    candidates = (
        [request.tokenizer]
        if request.tokenizer
        else [path / TOKENIZER for path in (request.directory, request.base) if path is not None]
    )
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ConversionError(
            f"{candidates[0]}: missing; give the model's sentencepiece file with --tokenizer (a tokenizer.json is not enough)"
        )
    return found


def _cut_vocabulary(
    model: ModelConfig, tensors: dict[str, LazyTensor], naming: Naming, *, config: HfConfig, pieces: int
) -> tuple[ModelConfig, dict[str, LazyTensor], dict[str, LazyTensor]]:
    """llava-hf has rows for `<image>`, `<pad>` and alignment after the tokenizer's; they are kept apart."""
    stated = model.language.vocab_size
    names = {"embedding": f"{naming.decoder}embed_tokens.weight", "head": f"{naming.head}weight"}
    for name in names.values():
        rows = tensors[name].shape[0]
        if rows < pieces:
            raise ConversionError(
                f"vocabulary too small: {name} has {rows} rows, the tokenizer {pieces} pieces; give the tokenizer of this model"
            )
        if rows != stated:
            raise ConversionError(f"wrong shape: {name} has {rows} rows, {CONFIG} states vocab_size {stated}")
    if config.image_token is None:
        return model, tensors, {}
    if not pieces <= config.image_token < stated:
        raise ConversionError(
            f"image_token_index {config.image_token} in {CONFIG} lies outside {pieces} .. {stated - 1}: the tokenizer has {pieces} pieces, the model "
            f"{stated} rows, and <image> comes after the pieces; give the tokenizer of this model with --tokenizer, or correct the configuration"
        )
    vocabulary = config.image_token
    added = {part: tensors[name].slice_rows(vocabulary, stated) for part, name in names.items()}
    cut = {name: tensors[name].slice_rows(0, vocabulary) for name in names.values()}
    return replace(model, language=replace(model.language, vocab_size=vocabulary)), {**tensors, **cut}, added


def _check_equal_dtypes(mappings: tuple[WeightMapping, ...], tensors: dict[str, LazyTensor]) -> None:
    for mapping in mappings:
        first = mapping.hf_names[0]
        for name in mapping.hf_names[1:]:
            if tensors[name].dtype != tensors[first].dtype:
                raise ConversionError(
                    f"wrong dtype: {name} is {tensors[name].dtype}, {first} {tensors[first].dtype}; they become one tensor of ours"
                )


def _aspect_of_processor(directory: Path) -> str:
    path = directory / PREPROCESSOR
    return "pad" if path.is_file() and read_json(path).get("do_pad") else "square"
