"""Time and peak memory of import and export against a plain copy of the same bytes, flushed to the disk, in one run.

The model is random, with the widths of Vicuna-7B (or --hidden) and as many layers as asked for; several sizes show how memory grows with the model.
Each conversion runs in a process of its own, whose peak resident memory is taken from the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_share4v.checkpoint.hf_write import model_parts, write_index
from megatron_share4v.checkpoint.lazy import LazyTensor
from megatron_share4v.checkpoint.parts import write_parts, writing
from megatron_share4v.checkpoint.weight_map import LLAVA_HF, rows, unused_shapes
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig

BLOCK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model of at most 32000 pieces; without one a tiny one is trained")
    parser.add_argument("--directory", type=Path, required=True, help="for the files; about four times the model's bytes")
    parser.add_argument("--child", nargs=3, metavar=("COMMAND", "FROM", "TO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        convert(*arguments.child, shard_bytes=int(arguments.shard_gb * 1e9))
        return
    for layers in arguments.layers:
        print(json.dumps(measure(layers, arguments)), flush=True)


def measure(layers: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One size: seconds of each, their ratio to the copy, and peak memory."""
    source, ours, back, copy = (arguments.directory / name for name in ("hf", "ours", "back", "copy"))
    for path in (source, ours, back, copy):
        shutil.rmtree(path, ignore_errors=True)
    write_source(source, layers, arguments)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    found: dict[str, float] = {"layers": layers, "gb": round(size / 1e9, 3), "largest_shard_gb": round(largest / 1e9, 3)}
    found["copy_s"] = copied = timed_copy(source, copy)
    shutil.rmtree(copy)
    for command, start, end in (("import", source, ours), ("export", ours, back)):
        seconds, peak, baseline = child(command, start, end, arguments)
        found |= {f"{command}_s": seconds, f"{command}_gb_per_s": round(size / 1e9 / seconds, 3), f"{command}_over_copy": round(seconds / copied, 2)}
        found |= {f"{command}_peak_gb": peak, f"{command}_peak_over_start_gb": round(peak - baseline, 3)}
    return found


def write_source(directory: Path, layers: int, arguments: argparse.Namespace) -> None:
    """A random llava-hf model in bf16."""
    heads = arguments.hidden // 128
    width = {"hidden_size": arguments.hidden, "intermediate_size": arguments.hidden * 43 // 16, "num_attention_heads": heads}
    model = ModelConfig(vision=VisionConfig(), language=LanguageConfig(**width, num_layers=layers, num_key_value_heads=heads))
    table = rows(model, naming=LLAVA_HF, components=("language", "projector", "vision"))
    shapes = {name: shape for row in table for name, shape in row.their_shapes().items()}
    shapes |= {f"{LLAVA_HF.tower}{name}": shape for name, shape in unused_shapes(model).items()}
    shapes = {name: (32064, *shape[1:]) if shape[0] == 32000 else shape for name, shape in shapes.items()}
    noise = torch.randn(BLOCK).bfloat16()

    def value(shape: tuple[int, ...]) -> LazyTensor:
        size = torch.Size(shape).numel()
        return LazyTensor(shape, torch.bfloat16, "noise", lambda: noise.repeat(-(-size // BLOCK))[:size].view(shape))

    tensors = {name: value(shape) for name, shape in shapes.items()}
    shard_bytes = int(arguments.shard_gb * 1e9)
    with writing(directory, fingerprint="noise") as place:
        write_parts(place, model_parts(tensors, max_bytes=shard_bytes), title="noise")
        write_index(place.directory, tensors, max_bytes=shard_bytes)
        text = {**width, "num_hidden_layers": layers, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
        tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        tower |= {"image_size": 336, "patch_size": 14}
        config = {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": tower}
        (place.directory / "config.json").write_text(json.dumps(config))
        write_tokenizer(place.directory / "tokenizer.model", arguments.tokenizer)


def write_tokenizer(path: Path, given: Path | None) -> None:
    """The one given, or a tiny one: conversion looks at the number of its pieces alone."""
    if given is not None:
        shutil.copyfile(given, path)
    else:
        from megatron_share4v.data.quickstart_tokenizer import train_tokenizer

        train_tokenizer([f"sentence {number} of a tiny text" for number in range(200)], path, vocab_size=300)


def timed_copy(source: Path, target: Path) -> float:
    """Seconds of copying the weights and flushing them."""
    target.mkdir(parents=True)
    started = time.perf_counter()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    return round(time.perf_counter() - started, 2)


def child(command: str, start: Path, end: Path, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """(seconds, peak and initial resident memory in GB) of one conversion, imports not counted in the time."""
    base = [sys.executable, __file__, "--directory", str(arguments.directory), "--shard-gb", str(arguments.shard_gb)]
    done = subprocess.run([*base, "--child", command, str(start), str(end)], check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak, baseline = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak, baseline


def convert(command: str, start: str, end: str, *, shard_bytes: int) -> None:
    """In the child: convert and print what it took."""
    from megatron_share4v.checkpoint.exporter import export_model
    from megatron_share4v.checkpoint.hf_source import Request
    from megatron_share4v.checkpoint.importer import ImportOptions, import_model

    baseline, started = resident(), time.perf_counter()
    if command == "import":
        import_model(Request(directory=Path(start)), Path(end), options=ImportOptions())
    else:
        export_model(Path(start), Path(end), layout="llava-hf", shard_bytes=shard_bytes)
    print(json.dumps([round(time.perf_counter() - started, 2), resident(), baseline]))


def resident() -> float:
    """Peak resident memory of this process so far, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


if __name__ == "__main__":
    main()
