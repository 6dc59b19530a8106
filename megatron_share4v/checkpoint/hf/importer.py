"""A model of another layout to a checkpoint of ours, one tensor at a time. Finding and describing it is hf_source's business.

The checkpoint holds weights alone: runs start from it with checkpoint.initialize_from, at any layout. It carries the tokenizer, the weights that
only an export needs, and a configuration whose model section is the model's and whose other sections are defaults.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_share4v.checkpoint.assets import TOKENIZER, UNUSED
from megatron_share4v.checkpoint.hf.reader import read_json
from megatron_share4v.checkpoint.hf.source import HfModel, HfSource, open_hf_model
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
from megatron_share4v.config.run import PrecisionConfig, RunConfig, RunSection, TrainConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.dist_checkpoint_files import ByteRange, describe_tensors, write_tensor
from megatron_share4v.model.initialize import initial_value
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.text.template import get_template

FILE_BYTES = 1 << 30
PROVENANCE = "provenance.json"
"""In exported models: the hashes of their components."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a source does not say."""

    dtype: str | None = None
    """fp32, bf16 or fp16 for all weights; None: each as it is."""
    template: str = "vicuna_v1"
    seed: int = 42
    """Of a projector that no source has."""


def import_model(request: HfSource, target: Path, *, options: ImportOptions) -> Manifest:
    """Make the checkpoint `target`. Raises ConversionError naming the tensor, key or file that does not fit; `target` is then not there."""
    get_template(options.template)
    source = open_hf_model(request)
    as_stored = megatron_tensors(source, seed=options.seed)
    _check_tower(request, as_stored)
    ours = _in_dtype(as_stored, options.dtype)
    with stage_directory(target, fingerprint=_fingerprint(source, ours, options)) as staging:
        manifest = write_weights_checkpoint(
            staging,
            ours,
            config=_config(source, ours, options, target),
            state=RunState(step=0, consumed_samples=0, plan_fingerprint=""),
            source=f"{source.naming.title}: {', '.join(path.name for path in source.directories)}",
            write_assets=lambda: _write_assets(source, staging.path, options.dtype),
        )
    log_component_hashes(target, manifest)
    return manifest


def megatron_tensors(source: HfModel, *, seed: int) -> dict[str, LazyTensor]:
    """All global tensors of ours. A projector that the source does not have is initialised from `seed`, and this is said."""
    ours = {mapping.name: _joined(mapping, source.tensors) for mapping in source.mappings}
    if not source.has_projector:
        get_logger().warning(
            "projector: none was given, so it is freshly initialised (seed %d), as stage 1 needs it", seed
        )
        dtype = ours["language.embedding.weight"].dtype
        naming = LLAVA_HF if source.config.projector.type == "mlp2x_gelu" else SHARE4V
        for mapping in weight_mappings(source.config, naming=naming, components=("projector",)):
            ours[mapping.name] = LazyTensor(
                mapping.shape, dtype, f"initialised from seed {seed}", _initialiser(mapping, source, seed, dtype)
            )
    return ours


def write_weights_checkpoint(
    staging: StagingDirectory,
    ours: LazyTensors,
    *,
    config: RunConfig,
    state: RunState,
    source: str,
    write_assets: Callable[[], None],
) -> Manifest:
    """Everything of a checkpoint of weights alone, in a workplace that is yet to be published. `companions` writes the files that go with it."""
    groups = split_into_shards(ours, max_bytes=FILE_BYTES)
    parts = [
        OutputFile(f"__0_{n}.distcp", sum(t.nbytes for t in group.values()), _tensor_writer(group))
        for n, group in enumerate(groups)
    ]
    written = write_files(staging, parts, title="import")
    notes = {name: (file, *note) for file, part in written.items() for name, note in part.note.items()}
    placed = {name: ByteRange(file, offset, length) for name, (file, offset, length, _) in notes.items()}
    describe_tensors(
        staging.path, placed, tensors=((name, tensor.shape, tensor.dtype) for name, tensor in ours.items())
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
            {name: (tensor.shape, tensor.dtype, notes[name][3]) for name, tensor in ours.items()}
        ),
        files=hash_files(staging.path, known={name: part.stored for name, part in written.items()}),
    )
    write_manifest(staging.path, manifest)
    return manifest


def log_component_hashes(checkpoint: Path, manifest: Manifest) -> None:
    """Say what was made, with the hash of each component."""
    get_logger().info("%s: %.3f GB, from %s", checkpoint, manifest.size / 1e9, manifest.source)
    for component, digest in manifest.weights.items():
        get_logger().info("  %s: sha256 %s", component, digest)


def _joined(mapping: WeightMapping, theirs: Mapping[str, LazyTensor]) -> LazyTensor:
    parts = [theirs[name] for name in mapping.hf_names]
    return LazyTensor(
        mapping.shape,
        parts[0].dtype,
        parts[0].origin,
        lambda: mapping.transform.to_megatron([part.read() for part in parts]),
    )


def _initialiser(mapping: WeightMapping, source: HfModel, seed: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: initial_value(mapping.name, mapping.shape, seed=seed, model=source.config).to(dtype)


def _in_dtype(tensors: dict[str, LazyTensor], dtype: str | None) -> dict[str, LazyTensor]:
    return tensors if dtype is None else {name: cast_checked(name, tensor, dtype) for name, tensor in tensors.items()}


def _tensor_writer(group: LazyTensors) -> Callable[[HashingWriter, Callable[[int], Any]], dict[str, Any]]:
    def write(file: HashingWriter, progress: Callable[[int], Any]) -> dict[str, Any]:
        placed = {}
        for name, tensor in prefetch_tensors(group.items()):
            start = file.tell()
            write_tensor(file, tensor)
            digest = file.sha256_of_write(tensor.nbytes, since=start) or tensor_sha256(
                tensor
            )  # the file's own hash of the same bytes
            placed[name] = (start, file.tell() - start, digest)
            progress(tensor.nbytes)
        return placed

    return write


def _write_assets(source: HfModel, directory: Path, dtype: str | None) -> None:
    shutil.copyfile(source.tokenizer, directory / TOKENIZER)
    unused = {f"vision.{name}": tensor for name, tensor in source.unused().items()}
    added = {ADDED_ROWS[part]: tensor for part, tensor in source.added_rows.items()}
    if unused or added:
        write_safetensors(directory / UNUSED, _in_dtype({**unused, **added}, dtype))


def _config(source: HfModel, ours: LazyTensors, options: ImportOptions, target: Path) -> RunConfig:
    model = source.config
    dtype = ours["language.embedding.weight"].dtype
    if dtype == torch.float16:
        get_logger().info("weights: fp16 is kept in the checkpoint; runs and sessions compute in bf16, which rounds it")
    text = min(2048, model.language.max_position_embeddings - model.vision.num_patches + 1)
    return RunConfig(
        run=RunSection(directory=target.name),
        model=model,
        precision=PrecisionConfig(dtype="fp32" if FLOAT_NAMES[dtype] == "fp32" else "bf16"),
        data=DataConfig(
            train="",
            tokenizer=TOKENIZER,
            template=options.template,
            max_text_length=text,
            image_aspect_ratio=source.image_aspect_ratio,
        ),
        train=TrainConfig(global_batch_size=1),
    )


def _fingerprint(source: HfModel, ours: LazyTensors, options: ImportOptions) -> str:
    files = [
        path
        for directory in source.directories
        for path in (sorted(directory.iterdir()) if directory.is_dir() else [directory])
    ]
    files.append(source.tokenizer)
    tensors = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in ours.items()]
    return hashlib.sha256(
        json.dumps(
            [file_states(path for path in files if path.is_file()), tensors, str(options), library_versions()]
        ).encode()
    ).hexdigest()


def _check_tower(request: HfSource, ours: LazyTensors) -> None:
    """An export of ours says which tower belongs to it; another one beside it would silently give other answers. Costs one more reading of it."""
    path = request.directory / PROVENANCE
    expected = read_json(path).get("weights", {}).get("vision") if path.is_file() and not request.any_tower else None
    if expected is None:
        return
    digest = hash_components({name: tensor for name, tensor in ours.items() if name.startswith("vision.")})["vision"]
    if digest != expected:
        raise ConversionError(
            f"{request.tower or request.directory}: another tower than {path} says (sha256 {digest[:12]}, stated {expected[:12]}); "
            "give the one that it was exported with, or say --any-tower"
        )
