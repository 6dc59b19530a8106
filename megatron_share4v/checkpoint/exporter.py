"""A checkpoint of ours to the layout of transformers' LLaVA or of ShareGPT4V, one tensor at a time. hf_files writes all that is no weight.

llava-hf has rows for `<image>`, `<pad>` and alignment after the tokenizer's. An imported model that was not trained gets its own ones back; otherwise
they are the mean of the others, as rows of zeros could win a greedy answer and random ones would make exports differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_share4v.checkpoint import hf_files
from megatron_share4v.checkpoint.companions import UNUSED, tokenizer_of
from megatron_share4v.checkpoint.handover import config_of
from megatron_share4v.checkpoint.hf_read import open_file
from megatron_share4v.checkpoint.hf_write import model_parts, write_index
from megatron_share4v.checkpoint.importer import PROVENANCE
from megatron_share4v.checkpoint.lazy import FLOAT_NAMES, FLOATS, LastRead, LazyTensor, hash_components
from megatron_share4v.checkpoint.manifest import Manifest, current_versions, verify
from megatron_share4v.checkpoint.parts import write_parts, writing
from megatron_share4v.checkpoint.store import locate
from megatron_share4v.checkpoint.weight_map import CLIP, COMPONENTS, LLAVA_HF, SHARE4V, Component, Naming, check_ours, unused_shapes
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.log import get_logger
from megatron_share4v.mcore.checkpointing import STATE_PREFIX
from megatron_share4v.mcore.tensor_files import stored_tensors
from megatron_share4v.model.initialize import initial_value

Layout = Literal["llava-hf", "share4v"]
TOWER_FOLDER = "vision_tower"
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is to be read one tensor at a time."""

    path: Path
    manifest: Manifest
    config: RunConfig
    weights: dict[str, LazyTensor]
    unused: dict[str, LazyTensor]
    """What goes with it for exports alone (checkpoint/companions.py)."""

    @property
    def tokenizer(self) -> Path:
        """Its own copy, or the file that its configuration names."""
        return tokenizer_of(self.path, self.config.data)


def open_checkpoint(path: Path) -> Opened:
    """The checkpoint that `path` means (see store.locate). Raises CheckpointError when it is missing, or a file of it is missing or too short."""
    path = locate(path)
    manifest = verify(path, contents=False)
    weights = {
        name: LazyTensor(tensor.shape, tensor.dtype, str(path), tensor.read)
        for name, tensor in stored_tensors(path).items()
        if not name.startswith(STATE_PREFIX)
    }
    unused = open_file(path / UNUSED) if (path / UNUSED).is_file() else {}
    return Opened(path, manifest, config_of(manifest, where=path), weights, unused)


def export_model(checkpoint: Path, target: Path, *, layout: Layout, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the directory `target`, in `dtype` (fp32, bf16, fp16) or as stored; the checkpoint that was read.

    Every byte of the checkpoint is compared with its manifest meanwhile. Raises CheckpointError when it is damaged and ConversionError when it
    does not fit the layout; `target` is then not there.
    """
    opened = open_checkpoint(checkpoint)
    stored = {FLOAT_NAMES[tensor.dtype] for tensor in opened.weights.values()}
    if dtype is None and len(stored) > 1:
        raise ConversionError(f"{opened.path}: holds weights in {', '.join(sorted(stored))}; say which one to write with --dtype")
    chosen = dtype or stored.pop()
    folders = {
        folder: {name: cast_checked(name, tensor, chosen) for name, tensor in tensors.items()}
        for folder, tensors in their_tensors(opened, layout=layout).items()
    }
    fingerprint = hashlib.sha256(json.dumps([str(opened.path.resolve()), _files(opened), layout, chosen, shard_bytes]).encode())
    with writing(target, fingerprint=fingerprint.hexdigest()) as place, ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify, opened.path, contents=True)
        parts = [part for folder, tensors in folders.items() for part in model_parts(tensors, max_bytes=shard_bytes, folder=folder)]
        write_parts(place, parts, title=f"export {layout}")
        for folder, tensors in folders.items():
            write_index(place.directory / folder, tensors, max_bytes=shard_bytes)
        _write_files(place.directory, opened, layout=layout, dtype=chosen)
        verified.result()
    get_logger().info("%s: %s in %s, from %s (step %d)", target, layout, chosen, opened.path, opened.manifest.state.step)
    return opened.path


def their_tensors(opened: Opened, *, layout: Layout) -> dict[str, dict[str, LazyTensor]]:
    """Every tensor of an export by folder ("" or "vision_tower/") and name, as stored. Raises ConversionError when one of ours is missing."""
    if layout == "llava-hf":
        plain = _renamed(opened, LLAVA_HF, ("language", "projector", "vision"))
        return {"": {**_with_added_rows(opened, plain), **_unused(opened, prefix=LLAVA_HF.tower or "")}}
    main = _renamed(opened, SHARE4V, ("language", "projector"))
    tower = {**_renamed(opened, CLIP, ("vision",)), **_unused(opened, prefix=CLIP.tower or "")}
    return {"": main, f"{TOWER_FOLDER}/": tower}


def cast_checked(name: str, tensor: LazyTensor, dtype: str) -> LazyTensor:
    """`tensor` rounded to `dtype`; a value that fp16 cannot hold is an error when it is read, not an infinity."""
    rounded = tensor.cast(FLOATS[dtype])
    if dtype != "fp16" or tensor.dtype == rounded.dtype:
        return rounded

    def read() -> torch.Tensor:
        values = rounded.read()
        if not torch.isfinite(values).all():
            raise ConversionError(f"{tensor.origin}: {name} has values beyond fp16's 65504; export in bf16 or fp32")
        return values

    return LazyTensor(rounded.shape, rounded.dtype, rounded.origin, read)


def _renamed(opened: Opened, naming: Naming, components: tuple[Component, ...]) -> dict[str, LazyTensor]:
    assert set(components) <= set(COMPONENTS)
    last = LastRead()
    result = {}
    for row in check_ours(opened.weights, opened.config.model, naming=naming, components=components):
        whole = opened.weights[row.ours]
        for number, (name, shape) in enumerate(row.their_shapes().items()):
            result[name] = LazyTensor(shape, whole.dtype, whole.origin, _part(last, row.ours, whole, row.transform.to_theirs, number))
    return result


def _part(
    last: LastRead, name: str, whole: LazyTensor, split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], number: int
) -> Callable[[], torch.Tensor]:
    return lambda: last.parts(name, lambda: split(whole.read()))[number]


def _unused(opened: Opened, *, prefix: str) -> dict[str, LazyTensor]:
    """The tower's weights that we do not compute: carried along since the import, or else fresh, and this is said."""
    model, dtype = opened.config.model, opened.weights["vision.class_embedding"].dtype
    result, fresh = {}, []
    for name, shape in unused_shapes(model).items():
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


def _with_added_rows(opened: Opened, plain: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    rows = hf_files.llava_vocab_rows(opened.config.model)
    changed = {}
    for part, name in {"embedding": f"{LLAVA_HF.decoder}embed_tokens.weight", "head": f"{LLAVA_HF.head}weight"}.items():
        changed[name] = _extended(plain[name], rows, own=opened.unused.get(f"{part}.added_rows") if opened.manifest.state.step == 0 else None)
    return {**plain, **changed}


def _extended(tensor: LazyTensor, rows: int, *, own: LazyTensor | None) -> LazyTensor:
    missing = rows - tensor.shape[0]

    def read() -> torch.Tensor:
        values = tensor.read()
        if own is not None and own.shape[0] == missing:
            return torch.cat([values, own.read().to(values.dtype)])
        mean = values.mean(0, dtype=torch.float32).to(values.dtype)
        return torch.cat([values, mean.expand(missing, -1)])

    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, tensor.origin, read)


def _write_files(directory: Path, opened: Opened, *, layout: Layout, dtype: str) -> None:
    config = opened.config
    aspect = config.data.image_aspect_ratio
    if layout == "llava-hf":
        hf_files.write_llava_hf_files(
            directory, model=config.model, tokenizer=opened.tokenizer, template=config.data.template, image_aspect_ratio=aspect, dtype=dtype
        )
    else:
        hf_files.write_share4v_files(
            directory, model=config.model, tokenizer=opened.tokenizer, tower_path=TOWER_FOLDER, image_aspect_ratio=aspect, dtype=dtype
        )
    vision = {name: tensor.cast(FLOATS[dtype]) for name, tensor in opened.weights.items() if name.startswith("vision.")}
    content = {"step": opened.manifest.state.step, "dtype": dtype, "weights": hash_components(vision), "versions": current_versions()}
    (directory / PROVENANCE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _files(opened: Opened) -> dict[str, str]:
    return {name: file.sha256 for name, file in opened.manifest.files.items()}
