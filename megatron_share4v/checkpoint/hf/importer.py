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
from megatron_share4v.checkpoint.hf.source import Request, Source, open_source
from megatron_share4v.checkpoint.hf.vocab import ROWS_OF
from megatron_share4v.checkpoint.hf.weight_map import LLAVA_HF, SHARE4V, Row, rows
from megatron_share4v.checkpoint.hf.writer import shards, write_file
from megatron_share4v.checkpoint.lazy_tensor import (
    FLOAT_NAMES,
    LazyTensor,
    Tensors,
    cast_checked,
    component_digests,
    digest_of,
    hash_components,
    read_ahead,
)
from megatron_share4v.checkpoint.manifest import Manifest, RunState, current_versions, describe_files, write_manifest
from megatron_share4v.checkpoint.resumable_writer import Output, Part, Workplace, stated, write_parts, writing
from megatron_share4v.config.data import DataConfig
from megatron_share4v.config.load import dump
from megatron_share4v.config.run import PrecisionConfig, RunConfig, RunSection, TrainConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.dist_checkpoint_files import Placed, describe_tensors, write_tensor
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


def import_model(request: Request, target: Path, *, options: ImportOptions) -> Manifest:
    """Make the checkpoint `target`. Raises ConversionError naming the tensor, key or file that does not fit; `target` is then not there."""
    get_template(options.template)
    source = open_source(request)
    as_stored = our_tensors(source, seed=options.seed)
    _check_tower(request, as_stored)
    ours = _in_dtype(as_stored, options.dtype)
    with writing(target, fingerprint=_fingerprint(source, ours, options)) as place:
        manifest = write_checkpoint(
            place,
            ours,
            config=_config(source, ours, options, target),
            state=RunState(step=0, consumed_samples=0, plan_fingerprint=""),
            source=f"{source.naming.title}: {', '.join(path.name for path in source.directories)}",
            companions=lambda: _write_companions(source, place.directory, options.dtype),
        )
    report_weights(target, manifest)
    return manifest


def our_tensors(source: Source, *, seed: int) -> dict[str, LazyTensor]:
    """All global tensors of ours. A projector that the source does not have is initialised from `seed`, and this is said."""
    ours = {row.ours: _joined(row, source.tensors) for row in source.rows}
    if not source.has_projector:
        get_logger().warning(
            "projector: none was given, so it is freshly initialised (seed %d), as stage 1 needs it", seed
        )
        dtype = ours["language.embedding.weight"].dtype
        naming = LLAVA_HF if source.model.projector.type == "mlp2x_gelu" else SHARE4V
        for row in rows(source.model, naming=naming, components=("projector",)):
            ours[row.ours] = LazyTensor(
                row.shape, dtype, f"initialised from seed {seed}", _initialiser(row, source, seed, dtype)
            )
    return ours


def write_checkpoint(
    place: Workplace, ours: Tensors, *, config: RunConfig, state: RunState, source: str, companions: Callable[[], None]
) -> Manifest:
    """Everything of a checkpoint of weights alone, in a workplace that is yet to be published. `companions` writes the files that go with it."""
    groups = shards(ours, max_bytes=FILE_BYTES)
    parts = [
        Part(f"__0_{n}.distcp", sum(t.nbytes for t in group.values()), _tensor_writer(group))
        for n, group in enumerate(groups)
    ]
    written = write_parts(place, parts, title="import")
    notes = {name: (file, *note) for file, part in written.items() for name, note in part.note.items()}
    placed = {name: Placed(file, offset, length) for name, (file, offset, length, _) in notes.items()}
    describe_tensors(
        place.directory, placed, tensors=((name, tensor.shape, tensor.dtype) for name, tensor in ours.items())
    )
    companions()
    manifest = Manifest(
        state=state,
        updates=None,
        layout=Layout(),
        config=dump(config),
        versions=current_versions(),
        source=source,
        weights=component_digests(
            {name: (tensor.shape, tensor.dtype, notes[name][3]) for name, tensor in ours.items()}
        ),
        files=describe_files(place.directory, known={name: part.stored for name, part in written.items()}),
    )
    write_manifest(place.directory, manifest)
    return manifest


def report_weights(checkpoint: Path, manifest: Manifest) -> None:
    """Say what was made, with the hash of each component."""
    get_logger().info("%s: %.3f GB, from %s", checkpoint, manifest.size / 1e9, manifest.source)
    for component, digest in manifest.weights.items():
        get_logger().info("  %s: sha256 %s", component, digest)


def _joined(row: Row, theirs: Mapping[str, LazyTensor]) -> LazyTensor:
    parts = [theirs[name] for name in row.theirs]
    return LazyTensor(
        row.shape, parts[0].dtype, parts[0].origin, lambda: row.transform.to_ours([part.read() for part in parts])
    )


def _initialiser(row: Row, source: Source, seed: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: initial_value(row.ours, row.shape, seed=seed, model=source.model).to(dtype)


def _in_dtype(tensors: dict[str, LazyTensor], dtype: str | None) -> dict[str, LazyTensor]:
    return tensors if dtype is None else {name: cast_checked(name, tensor, dtype) for name, tensor in tensors.items()}


def _tensor_writer(group: Tensors) -> Callable[[Output, Callable[[int], Any]], dict[str, Any]]:
    def write(file: Output, progress: Callable[[int], Any]) -> dict[str, Any]:
        placed = {}
        for name, tensor in read_ahead(group.items()):
            start = file.tell()
            write_tensor(file, tensor)
            digest = file.digest_of(tensor.nbytes, since=start) or digest_of(
                tensor
            )  # the file's own hash of the same bytes
            placed[name] = (start, file.tell() - start, digest)
            progress(tensor.nbytes)
        return placed

    return write


def _write_companions(source: Source, directory: Path, dtype: str | None) -> None:
    shutil.copyfile(source.tokenizer, directory / TOKENIZER)
    unused = {f"vision.{name}": tensor for name, tensor in source.unused().items()}
    added = {ROWS_OF[part]: tensor for part, tensor in source.added_rows.items()}
    if unused or added:
        write_file(directory / UNUSED, _in_dtype({**unused, **added}, dtype))


def _config(source: Source, ours: Tensors, options: ImportOptions, target: Path) -> RunConfig:
    model = source.model
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


def _fingerprint(source: Source, ours: Tensors, options: ImportOptions) -> str:
    files = [
        path
        for directory in source.directories
        for path in (sorted(directory.iterdir()) if directory.is_dir() else [directory])
    ]
    files.append(source.tokenizer)
    tensors = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in ours.items()]
    return hashlib.sha256(
        json.dumps(
            [stated(path for path in files if path.is_file()), tensors, str(options), current_versions()]
        ).encode()
    ).hexdigest()


def _check_tower(request: Request, ours: Tensors) -> None:
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
