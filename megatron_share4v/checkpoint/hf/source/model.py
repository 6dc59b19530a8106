"""Find and describe a Hugging Face model: its configuration, lazy tensors and tokenizer. No weights are read.

Accepts transformers' LLaVA, ShareGPT4V/LLaVA originals with the tower inside or beside them, parts (a CLIP tower, a
LLaMA, a projector), and an adapter of peft, delta weights or a projector on top of a base model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_share4v.checkpoint.hf.adapters.apply import is_adapter, merge_adapter, merge_delta
from megatron_share4v.checkpoint.hf.config import CONFIG, AspectRatio, HfConfig, parse_model_config
from megatron_share4v.checkpoint.hf.families import TOWER_FAMILIES
from megatron_share4v.checkpoint.hf.image_processor import find_image_processor, parse_image_processor
from megatron_share4v.checkpoint.hf.naming import (
    DECODER,
    HEAD,
    TOWERS,
    detect_naming,
    find_tower_tensor,
    present_components,
)
from megatron_share4v.checkpoint.hf.source.hub_cache import open_snapshot
from megatron_share4v.checkpoint.hf.source.reader import (
    has_weights,
    open_weights_directory,
    open_weights_file,
    read_json,
)
from megatron_share4v.checkpoint.hf.source.template import PROVENANCE
from megatron_share4v.checkpoint.hf.source.tied_head import resolve_head
from megatron_share4v.checkpoint.hf.source.tokenizer_rule import open_source_tokenizer
from megatron_share4v.checkpoint.hf.source.tower import TowerQuestion, UseTower, drop_ungathered_tower, find_tower
from megatron_share4v.checkpoint.hf.source.tower_shapes import clip_tower_from_shapes
from megatron_share4v.checkpoint.hf.vision_config import parse_vision_config
from megatron_share4v.checkpoint.hf.vocab import cut_vocabulary
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
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor, check_float_dtypes, check_not_empty, merge_disjoint
from megatron_share4v.config.model import ModelConfig, VisionConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.text.load_tokenizer import TOKENIZER_FILES, find_tokenizer
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import TokenizerRule

PROJECTOR = "mm_projector.bin"
TEXT_ENCODER = ("text_model.", "text_projection", "visual_projection", "logit_scale", "logit_bias")


@dataclass(frozen=True, kw_only=True)
class HfSource:
    """Paths of a model to import; `directory` is enough when it holds everything."""

    directory: Path
    base: Path | None = None
    """Base model of the adapter, delta weights or projector in `directory`."""
    delta: bool = False
    """`directory` holds delta weights."""
    tower: Path | None = None
    use_tower: UseTower | None = None
    """Choice between a tower among the weights and one in a folder, where there are both."""
    projector: Path | None = None
    """A projector's file, or a directory with mm_projector.bin."""
    tokenizer: Path | None = None
    """A tokenizer.model or tokenizer.json, or a directory with one."""
    tokenizer_rule: TokenizerRule | None = None
    """How text after a special token is tokenised; None: as the files beside the tokenizer say."""
    any_tower: bool = False
    """Accept `tower` although the configuration names another one."""

    def resolve(self) -> HfSource:
        """Return the same source with snapshots for repositories of the Hugging Face cache, and files for directories.

        Raises ConversionError for a repository without a snapshot to choose.
        """

        def file_in(path: Path | None, name: str) -> Path | None:
            return None if path is None else open_snapshot(path) / name if path.is_dir() else path

        return replace(
            self,
            directory=open_snapshot(self.directory),
            base=None if self.base is None else open_snapshot(self.base),
            tower=None if self.tower is None else open_snapshot(self.tower),
            projector=file_in(self.projector, PROJECTOR),
            tokenizer=None if self.tokenizer is None else _tokenizer_file(self.tokenizer),
        )


def _tokenizer_file(path: Path) -> Path:
    """Return the tokenizer file that `path` is or has; the name of the first kind where it has none."""
    if not path.is_dir():
        return path
    directory = open_snapshot(path)
    return find_tokenizer(directory) or directory / TOKENIZER_FILES[0]


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """An open Hugging Face model."""

    config: ModelConfig
    naming: Naming
    mappings: tuple[WeightMapping, ...]
    """Mappings of the components that it has; a missing projector is to be initialised."""
    tensors: dict[str, LazyTensor]
    """Tensors by Hugging Face name; embedding and head without the added rows."""
    added_rows: dict[str, LazyTensor]
    """`embedding` and `head`: vocabulary rows that llava-hf adds for its own tokens and for alignment."""
    tokenizer: Tokenizer
    image_aspect_ratio: AspectRatio
    directories: tuple[Path, ...]

    @property
    def has_projector(self) -> bool:
        """Return whether the model has a projector."""
        return any(mapping.name.startswith("projector.") for mapping in self.mappings)

    def unused(self) -> dict[str, LazyTensor]:
        """Return the tower weights that are not computed, by the family's names in files without prefix."""
        kept = [
            drop for drop in ignored_weights(self.config, naming=self.naming, components=("vision",)) if drop.weights
        ]
        prefix, family = self.naming.tower_prefix(self.config.vision), TOWER_FAMILIES[self.config.vision.model_type]
        return {
            family.file_name(name.removeprefix(prefix)): tensor
            for name, tensor in self.tensors.items()
            if any(drop.covers(name) for drop in kept)
        }


def open_hf_model(paths: HfSource) -> HfModel:
    """Open the model at `paths`.

    Raises ConversionError naming the tensor, key or file that is missing, unsupported or present twice.
    """
    paths = paths.resolve()
    for directory in (paths.directory, paths.base):
        if directory is not None and not directory.is_dir():
            raise ConversionError(f"{directory}: there is no such directory; give the directory of a model")
    config_path = _config_path(paths)
    config = parse_model_config(read_json(config_path), where=str(config_path))
    if config.kind == "llava-hf" and (paths.tower is not None or paths.use_tower == "folder"):
        raise ConversionError(
            f"two towers: {paths.directory} is llava-hf, which has one among its weights, and "
            f"{paths.tower or 'one in a folder'}; leave --tower and --use-tower out"
        )
    tensors = drop_ungathered_tower(_with_projector(_main_tensors(paths), paths), directory=paths.directory)
    tower_folder, vision, tensors = _with_tower(paths, config, tensors)
    check_not_empty(tensors)
    naming = detect_naming(
        tensors, title=config.model.language.model_type if config.kind == "language" else config.kind
    )
    if tower_folder is None and config.kind != "llava-hf" and naming.tower is not None:
        vision = clip_tower_from_shapes(vision, naming.tower, tensors)
    vision = _with_image_processor(vision, paths, config, tower_folder)
    tensors, naming = resolve_head(tensors, naming, config.model.language, where=str(config_path))
    components = _components(naming, config, paths)
    beside = [path for path in (paths.directory, paths.base) if path is not None]
    tokenizer = open_source_tokenizer(beside, given=paths.tokenizer, rule=paths.tokenizer_rule)
    model = replace(
        config.model,
        vision=vision,
        projector=replace(config.model.projector, type=_projector_type(config, naming, tensors)),
    )
    provenance = paths.directory / PROVENANCE
    exported = read_json(provenance).get("vocab_size") if provenance.is_file() else None
    model, tensors, added = cut_vocabulary(
        model, tensors, naming, config=config, tokenizer=tokenizer, exported=exported
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
        image_aspect_ratio=config.image_aspect_ratio or _aspect_of_processor(paths),
        directories=tuple(
            path for path in (paths.directory, paths.base, tower_folder, paths.projector) if path is not None
        ),
    )


def _config_path(paths: HfSource) -> Path:
    for directory in (paths.directory, paths.base):
        if directory is not None and (directory / CONFIG).is_file():
            return directory / CONFIG
    what = "an adapter" if is_adapter(paths.directory) else "only a projector" if _is_projector(paths.directory) else ""
    if paths.base is None and what:
        raise ConversionError(f"{paths.directory}: is {what}; give the model that it belongs to with --base")
    missing = paths.base or paths.directory
    raise ConversionError(f"{missing / CONFIG}: missing; give the directory of a model, with its config.json")


def _is_projector(directory: Path) -> bool:
    return not has_weights(directory) and (directory / PROJECTOR).is_file()


def _main_tensors(paths: HfSource) -> dict[str, LazyTensor]:
    directory, base = paths.directory, paths.base
    adapter = is_adapter(directory)
    only_projector = not adapter and _is_projector(directory)
    if paths.delta and (adapter or only_projector):
        what = "an adapter" if adapter else "only a projector"
        raise ConversionError(f"{directory}: is {what}, no delta weights; leave --delta out")
    if base is None:
        if adapter or only_projector or paths.delta:
            what = "an adapter" if adapter else "only a projector" if only_projector else "delta weights"
            raise ConversionError(f"{directory}: is {what}; give the model that it belongs to with --base")
        return open_weights_directory(directory)
    if adapter:
        return merge_adapter(open_weights_directory(base), directory)
    if paths.delta:
        return merge_delta(open_weights_directory(base), open_weights_directory(directory))
    if only_projector:
        return merge_disjoint(open_weights_directory(base), open_weights_file(directory / PROJECTOR))
    raise ConversionError(f"{directory}: is a whole model, so --base {base} is not used; leave it out, or use --delta")


def _with_projector(tensors: dict[str, LazyTensor], paths: HfSource) -> dict[str, LazyTensor]:
    if paths.projector is None:
        return tensors
    projector = open_weights_file(paths.projector)
    unexpected = [name for name in projector if "mm_projector" not in name]
    if unexpected:
        raise ConversionError(
            f"{paths.projector}: unexpected tensor: {unexpected[0]}; give a projector's file (mm_projector.bin)"
        )
    return merge_disjoint(tensors, projector)


def _with_tower(
    paths: HfSource, config: HfConfig, tensors: dict[str, LazyTensor]
) -> tuple[Path | None, VisionConfig, dict[str, LazyTensor]]:
    """Find the tower; return its folder, its configuration there, and the tensors with the tower's."""
    vision = config.model.vision
    if config.kind == "llava-hf":
        return None, vision, tensors
    question = TowerQuestion(
        directory=paths.directory, config=config, given=paths.tower, use=paths.use_tower, any_tower=paths.any_tower
    )
    folder, tensors = find_tower(question, tensors)
    if folder is None:
        return None, vision, tensors
    described = read_json(folder / CONFIG)
    # Only a bare language model does not say which positions its tower gives it.
    select = None if config.kind == "language" else vision.feature_select
    vision = parse_vision_config(
        described, feature_layer=vision.feature_layer, feature_select=select, where=str(folder / CONFIG)
    )
    if find_tower_tensor(tensors) is None:
        # Of a whole CLIP or SigLIP model, the text encoder is not needed.
        tower = open_weights_directory(folder).items()
        tensors = merge_disjoint(tensors, {name: t for name, t in tower if not name.startswith(TEXT_ENCODER)})
    return folder, vision, tensors


def _with_image_processor(
    vision: VisionConfig, paths: HfSource, config: HfConfig, tower_folder: Path | None
) -> VisionConfig:
    """Read the image processor of the model, or of the tower's folder; the family's where no file describes one."""
    whole = config.kind == "llava-hf"
    for directory in (paths.directory, paths.base) if whole else (tower_folder,):
        found = None if directory is None else find_image_processor(directory)
        if found is not None:
            path, described = found
            return parse_image_processor(described, vision, is_trained=whole, where=str(path))
    get_logger().info("image processor: that of %s, because no file describes one", vision.model_type)
    return vision


def _components(naming: Naming, config: HfConfig, paths: HfSource) -> tuple[Component, ...]:
    present = present_components(naming)
    if naming.decoder is None:
        raise ConversionError(
            f"{paths.directory}: missing tensor: {DECODER}: has no language model; give its directory"
        )
    if naming.head is None and not config.model.language.tie_word_embeddings:
        raise ConversionError(
            f"{paths.directory}: missing tensor: {HEAD}, and {CONFIG} does not state tie_word_embeddings true; "
            "copy the model again"
        )
    if naming.tower is None:
        raise ConversionError(f"{paths.directory}: missing tensor: {TOWERS[0]}: has no vision tower")
    # Only the start of stage 1 (a bare language model) may lack the projector.
    if config.kind == "language":
        return present
    layout = LLAVA_HF if config.kind == "llava-hf" else SHARE4V
    linear = config.model.projector.type == "linear"
    if (naming.projector_linear if linear else naming.projector_mlp) is None:
        prefix = layout.projector_linear if linear else (layout.projector_mlp or ("",))[0]
        raise ConversionError(
            f"{paths.directory}: missing tensor: {prefix}weight: "
            f"has no projector ({config.model.projector.type}); copy it again"
        )
    return COMPONENTS


def _projector_type(config: HfConfig, naming: Naming, tensors: dict[str, LazyTensor]) -> str:
    """Return the type of the projector; for parts, that of the projector's file."""
    if config.kind != "language" or (naming.projector_linear is None and naming.projector_mlp is None):
        return config.model.projector.type
    if naming.projector_linear is not None:
        return "linear"
    depth = sum(f"{prefix}weight" in tensors for prefix in naming.projector_mlp or ())
    return f"mlp{depth}x_gelu"


def _check_equal_dtypes(mappings: tuple[WeightMapping, ...], tensors: dict[str, LazyTensor]) -> None:
    for mapping in mappings:
        first = mapping.hf_names[0]
        for name in mapping.hf_names[1:]:
            if tensors[name].dtype != tensors[first].dtype:
                raise ConversionError(
                    f"wrong dtype: {name} is {tensors[name].dtype}, {first} {tensors[first].dtype}; "
                    "they become one tensor and need equal dtypes"
                )


def _aspect_of_processor(paths: HfSource) -> AspectRatio:
    """Read how pictures are made square; an adapter's base says it where the adapter does not."""
    for directory in (paths.directory, paths.base):
        found = None if directory is None else find_image_processor(directory)
        if found is not None:
            return "pad" if found[1].get("do_pad") else "square"
    return "square"
