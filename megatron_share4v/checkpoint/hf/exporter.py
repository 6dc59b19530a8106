"""Export a checkpoint to the layout of transformers' LLaVA or of ShareGPT4V, one tensor at a time.

metadata_files writes the other files. llava-hf has vocabulary rows for `<image>`, `<pad>` and alignment after the
tokenizer's (checkpoint/hf/vocab.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_share4v.checkpoint.assets import UNUSED, open_tokenizer
from megatron_share4v.checkpoint.compatibility import stored_config
from megatron_share4v.checkpoint.hf import metadata_files
from megatron_share4v.checkpoint.hf.families import TOWER_FAMILIES
from megatron_share4v.checkpoint.hf.official_loader import export_warnings, tower_name
from megatron_share4v.checkpoint.hf.source.reader import open_weights_file
from megatron_share4v.checkpoint.hf.source.template import PROVENANCE
from megatron_share4v.checkpoint.hf.vocab import ADDED_ROWS, added_vocab_rows
from megatron_share4v.checkpoint.hf.weight_map import (
    CLIP,
    COMPONENTS,
    LLAVA_HF,
    SHARE4V,
    Component,
    Naming,
    WeightMapping,
    check_megatron_weights,
    unused_tower_shapes,
)
from megatron_share4v.checkpoint.hf.writer import safetensors_files, write_index
from megatron_share4v.checkpoint.lazy_tensor import (
    FLOAT_NAMES,
    FLOATS,
    LazyTensor,
    LazyTensors,
    SplitCache,
    cast_checked,
    combine_component_hashes,
    tensor_sha256,
)
from megatron_share4v.checkpoint.manifest import Manifest, library_versions, verify_files
from megatron_share4v.checkpoint.resumable_writer import (
    StagingDirectory,
    discard_staging,
    file_states,
    stage_directory,
    write_files,
)
from megatron_share4v.checkpoint.store import resolve_checkpoint
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import CheckpointError, ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.dist_checkpoint import STATE_PREFIX
from megatron_share4v.mcore.dist_checkpoint_files import stored_tensors
from megatron_share4v.model.initialize import initial_value
from megatron_share4v.text.tokenizer import Tokenizer

Layout = Literal["llava-hf", "share4v"]
TOWER_FOLDER = "clip"
"""SGLang recognises a vision tower only by this word in its path."""
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OpenCheckpoint:
    """An open checkpoint, read one tensor at a time."""

    path: Path
    manifest: Manifest
    config: RunConfig
    weights: dict[str, LazyTensor]
    unused: dict[str, LazyTensor]
    """Weights stored only for exports (checkpoint/assets.py)."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer, or the one that its configuration names."""
        return open_tokenizer(self.path, self.config.data)


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """Open the checkpoint that `path` resolves to (see store.resolve_checkpoint).

    Raises CheckpointError when it is missing, or one of its files is missing or truncated.
    """
    path = resolve_checkpoint(path)
    manifest = verify_files(path, contents=False)
    weights = {
        name: LazyTensor(tensor.shape, tensor.dtype, str(path), tensor.read)
        for name, tensor in stored_tensors(path).items()
        if not name.startswith(STATE_PREFIX)
    }
    unused = open_weights_file(path / UNUSED) if (path / UNUSED).is_file() else {}
    return OpenCheckpoint(path, manifest, stored_config(manifest, where=path), weights, unused)


def export_model(
    checkpoint: Path,
    target: Path,
    *,
    layout: Layout,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    tower: str | None = None,
) -> Path:
    """Write the directory `target` in `dtype` (fp32, bf16, fp16), or each tensor as stored; return the checkpoint read.

    `tower` (share4v): path or hub name of the tower for the official code; None for the export's own, by its absolute
    path. Every byte of the checkpoint is compared with its manifest meanwhile. Raises CheckpointError when it is
    damaged, after deleting the staged files, and ConversionError when it does not fit the layout; `target` does not
    exist then.
    """
    opened = open_checkpoint(checkpoint)
    if tower is not None and layout != "share4v":
        raise ConversionError(f"--tower-name {tower}: the layout {layout} names no tower; leave it out")
    name = tower_name(tower, folder=target / TOWER_FOLDER)
    hashes = None if _hashes_hold(opened, dtype) else _TensorHashes(dtype)
    folders = {
        folder: tensors if dtype is None else {name: cast_checked(name, t, dtype) for name, t in tensors.items()}
        for folder, tensors in hf_tensors(opened, layout=layout, hashes=hashes).items()
    }
    with stage_directory(target, fingerprint=_fingerprint(opened, layout, dtype, shard_bytes)) as staging:
        _write_weights(staging, opened, folders, shard_bytes=shard_bytes, title=f"export {layout}")
        weights = opened.manifest.weights if hashes is None else hashes.components(opened)
        dtypes = {part: dtype or stored for part, stored in component_dtypes(opened).items()}
        _write_files(staging.path, opened, layout=layout, dtypes=dtypes, weights=weights, tower=name)
    stored = ", ".join(f"{part} {kind}" for part, kind in dtypes.items())
    get_logger().info("%s: %s, %s, from %s (step %d)", target, layout, stored, opened.path, opened.manifest.state.step)
    for component, digest in weights.items():
        get_logger().info("  %s: sha256 %s", component, digest)
    if layout == "share4v":
        get_logger().info("mm_vision_tower is %s; a directory that was moved needs it corrected in config.json", name)
        for warning in export_warnings(target, name):
            get_logger().warning("%s", warning)
    return opened.path


def component_dtypes(opened: OpenCheckpoint) -> dict[str, str]:
    """Return the dtype of most bytes of each component: fp32, bf16 or fp16."""
    sizes: dict[str, Counter[str]] = {part: Counter() for part in COMPONENTS}
    for name, tensor in opened.weights.items():
        sizes[name.partition(".")[0]][FLOAT_NAMES[tensor.dtype]] += tensor.nbytes
    return {part: found.most_common(1)[0][0] for part, found in sizes.items() if found}


def _fingerprint(opened: OpenCheckpoint, layout: Layout, dtype: str | None, shard_bytes: int) -> str:
    files = {name: file.sha256 for name, file in opened.manifest.files.items()}
    # The manifest's hashes are of what the files should hold; their state on the disk identifies what was read from
    # them.
    states = file_states(opened.path / name for name in files)
    content = [states, files, layout, dtype, shard_bytes, library_versions()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write_weights(
    staging: StagingDirectory,
    opened: OpenCheckpoint,
    folders: Mapping[str, LazyTensors],
    *,
    shard_bytes: int,
    title: str,
) -> None:
    """Write the weights and their indexes while the checkpoint's files are verified."""
    try:
        with ThreadPoolExecutor(1) as pool:
            verified = pool.submit(verify_files, opened.path, contents=True)
            parts = [
                part
                for folder, tensors in folders.items()
                for part in safetensors_files(tensors, max_bytes=shard_bytes, folder=folder)
            ]
            try:
                write_files(staging, parts, title=title)
            finally:  # report a damaged file before errors that follow from it
                verified.result()
    except CheckpointError:
        discard_staging(staging)
        raise
    for folder, tensors in folders.items():
        write_index(staging.path / folder, tensors, max_bytes=shard_bytes)


@dataclass(frozen=True)
class _TensorHashes:
    """SHA-256 of the Megatron tensors as the export has them, computed while they are read."""

    dtype: str | None
    """Dtype of all tensors; None keeps each."""
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: torch.Tensor) -> None:
        self.digests[name] = tensor_sha256(values if self.dtype is None else values.to(FLOATS[self.dtype]))

    def components(self, opened: OpenCheckpoint) -> dict[str, str]:
        """Return one SHA-256 per component; tensors that an interrupted process exported are read again."""
        for name, tensor in opened.weights.items():
            if name not in self.digests:
                self.add(name, tensor.read())
        return combine_component_hashes(
            {
                name: (tensor.shape, FLOATS[self.dtype] if self.dtype else tensor.dtype, self.digests[name])
                for name, tensor in opened.weights.items()
            }
        )


def _hashes_hold(opened: OpenCheckpoint, dtype: str | None) -> bool:
    """Return whether the manifest's component hashes are also those of the export."""
    return set(opened.manifest.weights) == set(COMPONENTS) and all(
        dtype is None or tensor.dtype == FLOATS[dtype] for tensor in opened.weights.values()
    )


def hf_tensors(
    opened: OpenCheckpoint, *, layout: Layout, hashes: _TensorHashes | None = None
) -> dict[str, dict[str, LazyTensor]]:
    """Return every tensor of an export by folder ("" or "clip/") and name, in the stored dtype.

    Raises ConversionError when the checkpoint lacks a tensor.
    """
    if layout == "llava-hf":
        plain = _convert(opened, LLAVA_HF, ("language", "projector", "vision"), hashes)
        return {"": {**_with_added_rows(opened, plain), **_unused(opened, LLAVA_HF)}}
    main = _convert(opened, SHARE4V, ("language", "projector"), hashes)
    tower = {**_convert(opened, CLIP, ("vision",), hashes), **_unused(opened, CLIP)}
    return {"": main, f"{TOWER_FOLDER}/": tower}


def _convert(
    opened: OpenCheckpoint, naming: Naming, components: tuple[Component, ...], hashes: _TensorHashes | None
) -> dict[str, LazyTensor]:
    """Map the checkpoint's tensors to Hugging Face names; parts of one tensor share a read through a SplitCache."""
    cache = SplitCache()
    result = {}
    for mapping in check_megatron_weights(opened.weights, opened.config.model, naming=naming, components=components):
        whole = opened.weights[mapping.name]
        split = functools.partial(_split, mapping, whole, hashes)
        for index, (name, shape) in enumerate(mapping.hf_shapes().items()):
            read = functools.partial(_read_part, cache, mapping.name, split, index)
            result[name] = LazyTensor(shape, whole.dtype, whole.origin, read)
    return result


def _split(mapping: WeightMapping, whole: LazyTensor, hashes: _TensorHashes | None) -> tuple[torch.Tensor, ...]:
    values = whole.read()
    if hashes is not None:
        hashes.add(mapping.name, values)
    return mapping.transform.to_hf(values)


def _read_part(cache: SplitCache, name: str, split: Callable[[], tuple[torch.Tensor, ...]], index: int) -> torch.Tensor:
    return cache.get(name, split)[index]


def has_optional_tower_weights(opened: OpenCheckpoint) -> bool:
    """Return whether the checkpoint stores the tower family's optional weights, which exports have then."""
    vision = opened.config.model.vision
    names = TOWER_FAMILIES[vision.model_type].optional_shapes(vision)
    return all(f"vision.{name}" in opened.unused for name in names)


def _unused(opened: OpenCheckpoint, naming: Naming) -> dict[str, LazyTensor]:
    """Return the tower weights that the model does not compute: stored since the import, or else initialised with a
    warning. Optional ones that are not stored are left out.
    """
    model, dtype = opened.config.model, opened.weights["vision.patch_embedding.weight"].dtype
    shapes, prefix = unused_tower_shapes(model), naming.tower_prefix(model.vision)
    if not has_optional_tower_weights(opened):
        for name in TOWER_FAMILIES[model.vision.model_type].optional_shapes(model.vision):
            del shapes[name]
    result, initialised = {}, []
    for name, shape in shapes.items():
        stored = opened.unused.get(f"vision.{name}")
        if stored is None or stored.shape != shape:
            initialised.append(name)
            value = initial_value(f"vision.unused.{name}", shape, seed=0, model=model).to(dtype)
            stored = LazyTensor(shape, dtype, "initialised", value.detach)
        result[prefix + name] = stored
    if initialised:
        get_logger().warning(
            "tower: %d tensors after its feature layer (%s ...) are not in %s and are written freshly initialised; "
            "no output depends on them",
            len(initialised),
            initialised[0],
            opened.path,
        )
    return result


def _with_added_rows(opened: OpenCheckpoint, plain: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    rows = metadata_files.llava_vocab_rows(opened.config.model, opened.tokenizer)
    names = {"embedding": f"{LLAVA_HF.decoder}embed_tokens.weight", "head": f"{LLAVA_HF.head}weight"}
    if opened.config.model.language.tie_word_embeddings:
        del names["head"]
    stored = opened.unused if opened.manifest.state.step == 0 else {}
    return {
        **plain,
        **{name: _extended(plain[name], rows, stored.get(ADDED_ROWS[part])) for part, name in names.items()},
    }


def _extended(tensor: LazyTensor, rows: int, stored: LazyTensor | None) -> LazyTensor:
    def read() -> torch.Tensor:
        values = tensor.read()
        return torch.cat([values, added_vocab_rows(values, rows - tensor.shape[0], imported=stored)])

    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, tensor.origin, read)


def _write_files(
    directory: Path,
    opened: OpenCheckpoint,
    *,
    layout: Layout,
    dtypes: dict[str, str],
    weights: dict[str, str],
    tower: str,
) -> None:
    config = opened.config
    aspect = config.data.image_aspect_ratio
    if layout == "llava-hf":
        metadata_files.write_llava_hf_files(
            directory,
            model=config.model,
            tokenizer=opened.tokenizer,
            template=config.data.template,
            image_aspect_ratio=aspect,
            dtype=dtypes["language"],
            tower_dtype=dtypes["vision"],
            tower_is_whole=has_optional_tower_weights(opened),
        )
    else:
        metadata_files.write_share4v_files(
            directory,
            model=config.model,
            tokenizer=opened.tokenizer,
            tower_folder=TOWER_FOLDER,
            tower_name=tower,
            image_aspect_ratio=aspect,
            dtype=dtypes["language"],
            tower_dtype=dtypes["vision"],
        )
    content = {
        "step": opened.manifest.state.step,
        "dtype": dtypes,
        "template": config.data.template,
        "tokenizer_rule": opened.tokenizer.rule,
        "vocab_size": config.model.language.vocab_size,
        "weights": weights,
        "versions": library_versions(),
    }
    (directory / PROVENANCE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
