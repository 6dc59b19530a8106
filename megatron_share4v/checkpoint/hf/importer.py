"""Import a Hugging Face model as a checkpoint, one tensor at a time; source.py finds and describes the model.

The checkpoint holds weights only: runs start from it with checkpoint.initialize_from, at any layout. It also has the
tokenizer, the weights that only an export needs, and a configuration with the model's model section and defaults
elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_share4v.checkpoint.assets import UNUSED, write_tokenizer
from megatron_share4v.checkpoint.hf.source.hub_cache import model_name
from megatron_share4v.checkpoint.hf.source.model import HfModel, HfSource, open_hf_model
from megatron_share4v.checkpoint.hf.source.reader import read_json
from megatron_share4v.checkpoint.hf.source.template import PROVENANCE, choose_template
from megatron_share4v.checkpoint.hf.vocab import ADDED_ROWS
from megatron_share4v.checkpoint.hf.weight_map import LLAVA_HF, SHARE4V, WeightMapping, weight_mappings
from megatron_share4v.checkpoint.hf.writer import split_into_shards, write_safetensors
from megatron_share4v.checkpoint.lazy_tensor import (
    FLOAT_NAMES,
    LazyTensor,
    LazyTensors,
    cast_checked,
    combine_component_hashes,
    hash_components,
    prefetch_tensors,
    tensor_sha256,
)
from megatron_share4v.checkpoint.manifest import Manifest, RunState, hash_files, library_versions, write_manifest
from megatron_share4v.checkpoint.resumable_writer import (
    HashingWriter,
    OutputFile,
    StagingDirectory,
    file_states,
    stage_directory,
    write_files,
)
from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.load import dump
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.config.run import PrecisionConfig, RunConfig, RunSection
from megatron_share4v.config.training import TrainConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.dist_checkpoint_files import ByteRange, describe_tensors, write_tensor
from megatron_share4v.model.initialize import initial_value
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.text.template import get_template

FILE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Import settings that a Hugging Face model does not determine."""

    dtype: str | None = None
    """fp32, bf16 or fp16 for all weights; None keeps each dtype."""
    template: str | None = None
    """Conversation template; None: that of the model's files, or else vicuna_v1 with a warning."""
    image_orientation: Literal["stored", "exif"] = "stored"
    """Written into the checkpoint, as `data.image_orientation` of a run is."""
    seed: int = 42
    """Seed of a projector that the model does not have."""


def import_model(paths: HfSource, target: Path, *, options: ImportOptions) -> Manifest:
    """Import a model as the checkpoint `target`.

    Raises ConversionError naming the tensor, key or file that does not fit; `target` does not exist then.
    """
    paths = paths.resolve()
    if options.template is not None:
        get_template(options.template)  # an unknown name ends the import before the model is looked at
    hf_model = open_hf_model(paths)
    template = choose_template(
        [path for path in (paths.directory, paths.base) if path is not None],
        options.template,
        tokenizer=hf_model.tokenizer,
        model_type=hf_model.config.language.model_type,
    )
    options = replace(options, template=template)
    as_stored = megatron_tensors(hf_model, seed=options.seed)
    _check_tower(paths, as_stored)
    tensors = _in_dtype(as_stored, options.dtype)
    with stage_directory(target, fingerprint=_fingerprint(hf_model, tensors, options)) as staging:
        manifest = write_weights_checkpoint(
            staging,
            tensors,
            config=_config(hf_model, tensors, template, options.image_orientation, target),
            state=RunState(step=0, consumed_samples=0, plan_fingerprint=""),
            source=f"{hf_model.naming.title}: {', '.join(model_name(path) for path in hf_model.directories)}",
            write_assets=lambda: _write_assets(hf_model, staging.path, options.dtype),
        )
    log_component_hashes(target, manifest)
    return manifest


def megatron_tensors(hf_model: HfModel, *, seed: int) -> dict[str, LazyTensor]:
    """Return all global Megatron tensors; a missing projector is initialised from `seed`, with a warning."""
    tensors = {}
    for mapping in hf_model.mappings:
        parts = [hf_model.tensors[name] for name in mapping.hf_names]
        read = functools.partial(_join, mapping, parts)
        tensors[mapping.name] = LazyTensor(mapping.shape, parts[0].dtype, parts[0].origin, read)
    if not hf_model.has_projector:
        message = "projector: none was given, so it is freshly initialised (seed %d), as stage 1 needs it"
        get_logger().warning(message, seed)
        dtype = tensors["language.embedding.weight"].dtype
        naming = LLAVA_HF if hf_model.config.projector.type == "mlp2x_gelu" else SHARE4V
        for mapping in weight_mappings(hf_model.config, naming=naming, components=("projector",)):
            read = functools.partial(_initialise, mapping, hf_model.config, seed, dtype)
            tensors[mapping.name] = LazyTensor(mapping.shape, dtype, f"initialised from seed {seed}", read)
    return tensors


def write_weights_checkpoint(
    staging: StagingDirectory,
    tensors: LazyTensors,
    *,
    config: RunConfig,
    state: RunState,
    source: str,
    write_assets: Callable[[], None],
) -> Manifest:
    """Write a checkpoint of weights only into a staging directory; `write_assets` writes its asset files."""
    groups = split_into_shards(tensors, max_bytes=FILE_BYTES)
    parts = [
        OutputFile(f"__0_{n}.distcp", sum(t.nbytes for t in group.values()), functools.partial(_write_tensors, group))
        for n, group in enumerate(groups)
    ]
    written = write_files(staging, parts, title="import")
    notes = {name: (file, *note) for file, part in written.items() for name, note in part.note.items()}
    placed = {name: ByteRange(file, offset, length) for name, (file, offset, length, _) in notes.items()}
    describe_tensors(
        staging.path, placed, tensors=((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
    )
    write_assets()
    manifest = Manifest(
        state=state,
        updates=None,
        layout=Layout(),
        config=dump(config),
        versions=library_versions(),
        source=source,
        weights=combine_component_hashes(
            {name: (tensor.shape, tensor.dtype, notes[name][3]) for name, tensor in tensors.items()}
        ),
        files=hash_files(staging.path, known={name: part.stored for name, part in written.items()}),
    )
    write_manifest(staging.path, manifest)
    return manifest


def log_component_hashes(checkpoint: Path, manifest: Manifest) -> None:
    """Log the size and source of a checkpoint and the hash of each component."""
    get_logger().info("%s: %.3f GB, from %s", checkpoint, manifest.size / 1e9, manifest.source)
    for component, digest in manifest.weights.items():
        get_logger().info("  %s: sha256 %s", component, digest)


def _join(mapping: WeightMapping, parts: Sequence[LazyTensor]) -> torch.Tensor:
    return mapping.transform.to_megatron([part.read() for part in parts])


def _initialise(mapping: WeightMapping, model: ModelConfig, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return initial_value(mapping.name, mapping.shape, seed=seed, model=model).to(dtype)


def _in_dtype(tensors: dict[str, LazyTensor], dtype: str | None) -> dict[str, LazyTensor]:
    return tensors if dtype is None else {name: cast_checked(name, tensor, dtype) for name, tensor in tensors.items()}


def _write_tensors(group: LazyTensors, file: HashingWriter, progress: Callable[[int], Any]) -> dict[str, Any]:
    """Write tensors to one file; return (offset, length, SHA-256 of the values) by name."""
    placed = {}
    for name, tensor in prefetch_tensors(group.items()):
        start = file.tell()
        write_tensor(file, tensor)
        # Writing has hashed a large tensor already.
        digest = file.sha256_of_write(tensor.nbytes, since=start) or tensor_sha256(tensor)
        placed[name] = (start, file.tell() - start, digest)
        progress(tensor.nbytes)
    return placed


def _write_assets(hf_model: HfModel, directory: Path, dtype: str | None) -> None:
    write_tokenizer(directory, hf_model.tokenizer)
    unused = {f"vision.{name}": tensor for name, tensor in hf_model.unused().items()}
    added = {ADDED_ROWS[part]: tensor for part, tensor in hf_model.added_rows.items()}
    if unused or added:
        write_safetensors(directory / UNUSED, _in_dtype({**unused, **added}, dtype))


def _config(
    hf_model: HfModel, tensors: LazyTensors, template: str, orientation: Literal["stored", "exif"], target: Path
) -> RunConfig:
    model = hf_model.config
    dtype = tensors["language.embedding.weight"].dtype
    if dtype == torch.float16:
        get_logger().info("weights: fp16 is kept in the checkpoint; runs and sessions compute in bf16, which rounds it")
    text = min(2048, model.language.max_position_embeddings - model.vision.num_features + 1)
    return RunConfig(
        run=RunSection(directory=target.name),
        model=model,
        precision=PrecisionConfig(dtype="fp32" if FLOAT_NAMES[dtype] == "fp32" else "bf16"),
        data=DataConfig(
            train="",
            tokenizer=hf_model.tokenizer.file_name,
            template=template,
            max_text_length=text,
            image_aspect_ratio=hf_model.image_aspect_ratio,
            image_orientation=orientation,
        ),
        train=TrainConfig(global_batch_size=1),
    )


def _fingerprint(hf_model: HfModel, tensors: LazyTensors, options: ImportOptions) -> str:
    files = [
        path
        for directory in hf_model.directories
        for path in (sorted(directory.iterdir()) if directory.is_dir() else [directory])
    ]
    files.append(hf_model.tokenizer.path)
    described = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()]
    states = file_states(path for path in files if path.is_file())
    content = [states, described, str(options), hf_model.tokenizer.rule, library_versions()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_tower(paths: HfSource, tensors: LazyTensors) -> None:
    """Check the tower against provenance.json of an export: another tower would silently change the outputs.

    Reads the tower once more.
    """
    path = paths.directory / PROVENANCE
    expected = read_json(path).get("weights", {}).get("vision") if path.is_file() and not paths.any_tower else None
    if expected is None:
        return
    digest = hash_components({name: tensor for name, tensor in tensors.items() if name.startswith("vision.")})["vision"]
    if digest != expected:
        raise ConversionError(
            f"{paths.tower or paths.directory}: another tower than {path} states "
            f"(sha256 {digest[:12]}, stated {expected[:12]}); give the one of the export, or use --any-tower"
        )
