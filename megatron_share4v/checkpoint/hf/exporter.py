"""A checkpoint of ours to the layout of transformers' LLaVA or of ShareGPT4V, one tensor at a time. hf_files writes all that is no weight.

llava-hf has rows for `<image>`, `<pad>` and alignment after the tokenizer's (checkpoint/hf/vocab.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_share4v.checkpoint.assets import UNUSED, tokenizer_path
from megatron_share4v.checkpoint.compatibility import stored_config
from megatron_share4v.checkpoint.hf import metadata_files
from megatron_share4v.checkpoint.hf.importer import PROVENANCE
from megatron_share4v.checkpoint.hf.reader import open_weights_file
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
    SplitCache,
    cast_checked,
    combine_component_hashes,
    tensor_sha256,
)
from megatron_share4v.checkpoint.manifest import Manifest, library_versions, verify_files
from megatron_share4v.checkpoint.resumable_writer import discard_staging, file_states, stage_directory, write_files
from megatron_share4v.checkpoint.store import resolve_checkpoint
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import CheckpointError, ConversionError
from megatron_share4v.logging import get_logger
from megatron_share4v.mcore.dist_checkpoint import STATE_PREFIX
from megatron_share4v.mcore.dist_checkpoint_files import stored_tensors
from megatron_share4v.model.initialize import initial_value

Layout = Literal["llava-hf", "share4v"]
TOWER_FOLDER = "clip"
"""SGLang takes a tower for one only when its path has this in it."""
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that is to be read one tensor at a time."""

    path: Path
    manifest: Manifest
    config: RunConfig
    weights: dict[str, LazyTensor]
    unused: dict[str, LazyTensor]
    """What goes with it for exports alone (checkpoint/assets.py)."""

    @property
    def tokenizer(self) -> Path:
        """Its own copy, or the file that its configuration names."""
        return tokenizer_path(self.path, self.config.data)


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """The checkpoint that `path` means (see store.locate). Raises CheckpointError when it is missing, or a file of it is missing or too short."""
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
    checkpoint: Path, target: Path, *, layout: Layout, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the directory `target`, in `dtype` (fp32, bf16, fp16) or as stored; the checkpoint that was read.

    Every byte of the checkpoint is compared with its manifest meanwhile. Raises CheckpointError when it is damaged, and forgets what was written
    from it, and ConversionError when it does not fit the layout; `target` is then not there.
    """
    opened = open_checkpoint(checkpoint)
    stored_as = {FLOAT_NAMES[tensor.dtype] for tensor in opened.weights.values()}
    if dtype is None and len(stored_as) > 1:
        raise ConversionError(
            f"{opened.path}: holds weights in {', '.join(sorted(stored_as))}; say which one to write with --dtype"
        )
    chosen = dtype or stored_as.pop()
    seen = None if _hashes_hold(opened, chosen) else _Seen(FLOATS[chosen])
    folders = {
        folder: {name: cast_checked(name, tensor, chosen) for name, tensor in tensors.items()}
        for folder, tensors in hf_tensors(opened, layout=layout, seen=seen).items()
    }
    files = {name: file.sha256 for name, file in opened.manifest.files.items()}
    # The hashes are what the files should hold; what was read from them in fact, before it was compared, goes by their state on the disk.
    content = [
        file_states(opened.path / name for name in files),
        files,
        layout,
        chosen,
        shard_bytes,
        library_versions(),
    ]
    with stage_directory(target, fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest()) as staging:
        try:
            with ThreadPoolExecutor(1) as pool:
                verified = pool.submit(verify_files, opened.path, contents=True)
                parts = [
                    part
                    for folder, tensors in folders.items()
                    for part in safetensors_files(tensors, max_bytes=shard_bytes, folder=folder)
                ]
                try:
                    write_files(staging, parts, title=f"export {layout}")
                finally:  # a damaged file explains whatever else went wrong
                    verified.result()
        except CheckpointError:
            discard_staging(staging)
            raise
        for folder, tensors in folders.items():
            write_index(staging.path / folder, tensors, max_bytes=shard_bytes)
        weights = opened.manifest.weights if seen is None else seen.components(opened)
        _write_files(staging.path, opened, layout=layout, dtype=chosen, weights=weights)
    get_logger().info(
        "%s: %s in %s, from %s (step %d)", target, layout, chosen, opened.path, opened.manifest.state.step
    )
    for component, digest in weights.items():
        get_logger().info("  %s: sha256 %s", component, digest)
    return opened.path


@dataclass(frozen=True)
class _Seen:
    """Hashes of our tensors, rounded as the export has them, taken while they are read."""

    dtype: torch.dtype
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: torch.Tensor) -> None:
        self.digests[name] = tensor_sha256(values.to(self.dtype))

    def components(self, opened: OpenCheckpoint) -> dict[str, str]:
        """One per component. What an earlier process wrote, whose export this one finished, is read again."""
        for name, tensor in opened.weights.items():
            if name not in self.digests:
                self.add(name, tensor.read())
        return combine_component_hashes(
            {name: (tensor.shape, self.dtype, self.digests[name]) for name, tensor in opened.weights.items()}
        )


def _hashes_hold(opened: OpenCheckpoint, dtype: str) -> bool:
    """Whether the manifest's hashes of the components are those of the export."""
    return set(opened.manifest.weights) == set(COMPONENTS) and all(
        tensor.dtype == FLOATS[dtype] for tensor in opened.weights.values()
    )


def hf_tensors(
    opened: OpenCheckpoint, *, layout: Layout, seen: _Seen | None = None
) -> dict[str, dict[str, LazyTensor]]:
    """Every tensor of an export by folder ("" or "clip/") and name, as stored. Raises ConversionError when one of ours is missing."""
    if layout == "llava-hf":
        plain = _renamed(opened, LLAVA_HF, ("language", "projector", "vision"), seen)
        return {"": {**_with_added_rows(opened, plain), **_unused(opened, prefix=LLAVA_HF.tower or "")}}
    main = _renamed(opened, SHARE4V, ("language", "projector"), seen)
    tower = {**_renamed(opened, CLIP, ("vision",), seen), **_unused(opened, prefix=CLIP.tower or "")}
    return {"": main, f"{TOWER_FOLDER}/": tower}


def _renamed(
    opened: OpenCheckpoint, naming: Naming, components: tuple[Component, ...], seen: _Seen | None
) -> dict[str, LazyTensor]:
    assert set(components) <= set(COMPONENTS)
    cache = SplitCache()
    result = {}
    for mapping in check_megatron_weights(opened.weights, opened.config.model, naming=naming, components=components):
        whole = opened.weights[mapping.name]
        split = _splitter(mapping, whole, seen)
        for number, (name, shape) in enumerate(mapping.hf_shapes().items()):
            result[name] = LazyTensor(shape, whole.dtype, whole.origin, _part(cache, mapping.name, split, number))
    return result


def _splitter(mapping: WeightMapping, whole: LazyTensor, seen: _Seen | None) -> Callable[[], tuple[torch.Tensor, ...]]:
    def split() -> tuple[torch.Tensor, ...]:
        values = whole.read()
        if seen is not None:
            seen.add(mapping.name, values)
        return mapping.transform.to_hf(values)

    return split


def _part(
    cache: SplitCache, name: str, split: Callable[[], tuple[torch.Tensor, ...]], number: int
) -> Callable[[], torch.Tensor]:
    return lambda: cache.get(name, split)[number]


def _unused(opened: OpenCheckpoint, *, prefix: str) -> dict[str, LazyTensor]:
    """The tower's weights that we do not compute: carried along since the import, or else fresh, and this is said."""
    model, dtype = opened.config.model, opened.weights["vision.class_embedding"].dtype
    result, fresh = {}, []
    for name, shape in unused_tower_shapes(model).items():
        carried = opened.unused.get(f"vision.{name}")
        if carried is None or carried.shape != shape:
            fresh.append(name)
            value = initial_value(f"vision.unused.{name}", shape, seed=0, model=model).to(dtype)
            carried = LazyTensor(shape, dtype, "initialised", lambda value=value: value)
        result[prefix + name] = carried
    if fresh:
        get_logger().warning(
            "tower: %d tensors after its feature layer (%s ...) are not in %s and are written freshly initialised; no answer depends on them",
            len(fresh),
            fresh[0],
            opened.path,
        )
    return result


def _with_added_rows(opened: OpenCheckpoint, plain: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    rows = metadata_files.llava_vocab_rows(opened.config.model)
    names = {"embedding": f"{LLAVA_HF.decoder}embed_tokens.weight", "head": f"{LLAVA_HF.head}weight"}
    carried = opened.unused if opened.manifest.state.step == 0 else {}
    return {
        **plain,
        **{name: _extended(plain[name], rows, carried.get(ADDED_ROWS[part])) for part, name in names.items()},
    }


def _extended(tensor: LazyTensor, rows: int, carried: LazyTensor | None) -> LazyTensor:
    def read() -> torch.Tensor:
        values = tensor.read()
        return torch.cat([values, added_vocab_rows(values, rows - tensor.shape[0], carried=carried)])

    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, tensor.origin, read)


def _write_files(
    directory: Path, opened: OpenCheckpoint, *, layout: Layout, dtype: str, weights: dict[str, str]
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
            dtype=dtype,
        )
    else:
        metadata_files.write_share4v_files(
            directory,
            model=config.model,
            tokenizer=opened.tokenizer,
            tower_path=TOWER_FOLDER,
            image_aspect_ratio=aspect,
            dtype=dtype,
        )
    content = {"step": opened.manifest.state.step, "dtype": dtype, "weights": weights, "versions": library_versions()}
    (directory / PROVENANCE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
