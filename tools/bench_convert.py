"""Benchmark time and peak memory of import and export against a copy of the same bytes, flushed to the disk.

The model is random, with the widths of Vicuna-7B (or --hidden) and the given layers. Each conversion runs in its own
process, whose peak resident memory the kernel reports. With several sizes, memory is extrapolated linearly to 13B,
adding its largest tensors (embedding and head, 32064 x 5120) where --hidden is smaller. Exit code 1: a conversion of
the largest size took more than twice the copy's time, or a conversion needs, or would need at 13B, more memory than its
largest file and 1 GiB.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_share4v.checkpoint.hf.weight_map import LLAVA_HF, unused_tower_shapes, weight_mappings
from megatron_share4v.checkpoint.hf.writer import safetensors_files, write_index
from megatron_share4v.checkpoint.lazy_tensor import LazyTensor
from megatron_share4v.checkpoint.resumable_writer import stage_directory, write_files
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.errors import exit_on_closed_output

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: examples/ is no installed package


BLOCK = 1 << 20
COMMANDS = ("import", "export")
MOST_OVER_COPY, MOST_OVER_SHARD_GB = 2.0, (1 << 30) / 1e9
GB_OF_13B = 26.7  # 13.35 billion weights in bf16
LARGEST_GB_OF_13B = 32064 * 5120 * 2 / 1e9
TENSORS_AT_ONCE = 4  # read, split, written, hashed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.model of at most 32000 pieces (default: train a tiny one)"
    )
    parser.add_argument("--repeat", type=int, default=1, help="repetitions; the fastest counts, for the copy too")
    parser.add_argument(
        "--directory", type=Path, required=True, help="directory for the files, about four times the model's bytes"
    )
    parser.add_argument("--child", nargs=3, metavar=("COMMAND", "FROM", "TO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        convert(*arguments.child, shard_bytes=int(arguments.shard_gb * 1e9))
        return
    measured = []
    for layers in arguments.layers:
        measured.append(measure(layers, arguments))
        print(json.dumps(measured[-1]), flush=True)
    lines, problems = check_limits(measured, hidden=arguments.hidden)
    print("\n".join([*lines, *(f"FAILED: {problem}" for problem in problems)]))
    sys.exit(1 if problems else 0)


def check_limits(measured: Sequence[dict[str, float]], *, hidden: int) -> tuple[list[str], list[str]]:
    """Return (lines about memory growth, exceeded limits)."""
    lines, problems = [], list(_exceeded_limits(measured))
    if len(measured) > 1:
        missing = max(0.0, LARGEST_GB_OF_13B - 32064 * hidden * 2 / 1e9) * TENSORS_AT_ONCE
        for command in COMMANDS:
            slope, start = line_through([(one["gb"], one[f"{command}_peak_over_start_gb"]) for one in measured])
            at_13b = start + slope * GB_OF_13B + missing
            bound = measured[-1]["file_gb"] + MOST_OVER_SHARD_GB
            lines.append(
                f"{command}: {slope:+.4f} GB of memory per GB of model; at 13B ({GB_OF_13B} GB) {at_13b:.2f} GB "
                f"of at most {bound:.2f}"
            )
            if at_13b > bound:
                problems.append(f"{command} would need {at_13b:.2f} GB at 13B, at most {bound:.2f}")
    return lines, problems


def _exceeded_limits(measured: Sequence[dict[str, float]]) -> Iterator[str]:
    for command in COMMANDS:
        # Only the largest size: start-up dominates small models.
        if (ratio := measured[-1][f"{command}_over_copy"]) > MOST_OVER_COPY:
            yield f"{command} of {measured[-1]['gb']} GB took {ratio} times as long as a copy, at most {MOST_OVER_COPY}"
        for one in measured:
            if (peak := one[f"{command}_peak_over_start_gb"]) > (bound := one["largest_shard_gb"] + MOST_OVER_SHARD_GB):
                yield f"{command} of {one['gb']} GB needed {peak} GB, at most {bound:.2f}"


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (slope, value at 0) of the least-squares line."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


def measure(layers: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one size: seconds of each command, their ratio to the copy, and peak memory."""
    source, imported, back, copy = (arguments.directory / name for name in ("hf", "ours", "back", "copy"))
    for path in (source, imported, back, copy):
        shutil.rmtree(path, ignore_errors=True)
    write_source(source, layers, arguments)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    found: dict[str, float] = {
        "layers": layers,
        "gb": round(size / 1e9, 3),
        "largest_shard_gb": round(largest / 1e9, 3),
    }
    found["file_gb"] = arguments.shard_gb
    found["copy_s"] = copied = min(timed_copy(source, copy) for _ in range(arguments.repeat))
    shutil.rmtree(copy)
    for command, start, end in (("import", source, imported), ("export", imported, back)):
        seconds, peak, baseline, cpu = min(run_child(command, start, end, arguments) for _ in range(arguments.repeat))
        found |= {
            f"{command}_s": seconds,
            f"{command}_gb_per_s": round(size / 1e9 / seconds, 3),
            f"{command}_over_copy": round(seconds / copied, 2),
        }
        found[f"{command}_cpu_s"] = cpu
        found |= {f"{command}_peak_gb": peak, f"{command}_peak_over_start_gb": round(peak - baseline, 3)}
    return found


def write_source(directory: Path, layers: int, arguments: argparse.Namespace) -> None:
    """Write a random llava-hf model in bf16."""
    heads = arguments.hidden // 128
    width = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 43 // 16,
        "num_attention_heads": heads,
    }
    model = ModelConfig(
        vision=VisionConfig(), language=LanguageConfig(**width, num_layers=layers, num_key_value_heads=heads)
    )
    table = weight_mappings(model, naming=LLAVA_HF, components=("language", "projector", "vision"))
    shapes = {name: shape for mapping in table for name, shape in mapping.hf_shapes().items()}
    shapes |= {f"{LLAVA_HF.tower}{name}": shape for name, shape in unused_tower_shapes(model).items()}
    shapes = {name: (32064, *shape[1:]) if shape[0] == 32000 else shape for name, shape in shapes.items()}
    noise = torch.randn(BLOCK).bfloat16()

    def value(shape: tuple[int, ...]) -> LazyTensor:
        size = torch.Size(shape).numel()
        return LazyTensor(shape, torch.bfloat16, "noise", lambda: noise.repeat(-(-size // BLOCK))[:size].view(shape))

    tensors = {name: value(shape) for name, shape in shapes.items()}
    shard_bytes = int(arguments.shard_gb * 1e9)
    with stage_directory(directory, fingerprint="noise") as staging:
        write_files(staging, safetensors_files(tensors, max_bytes=shard_bytes), title="noise")
        write_index(staging.path, tensors, max_bytes=shard_bytes)
        text = {
            **width,
            "num_hidden_layers": layers,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        }
        tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        tower |= {"image_size": 336, "patch_size": 14}
        config = {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": tower}
        (staging.path / "config.json").write_text(json.dumps(config))
        write_tokenizer(staging.path / "tokenizer.model", arguments.tokenizer)


def write_tokenizer(path: Path, given: Path | None) -> None:
    """Write the given tokenizer or a tiny one: conversion only uses its number of pieces."""
    if given is not None:
        shutil.copyfile(given, path)
    else:
        from examples.quickstart.tokenizer import train_tokenizer

        train_tokenizer([f"sentence {number} of a tiny text" for number in range(200)], path, vocab_size=300)


def timed_copy(source: Path, target: Path) -> float:
    """Copy the weights and flush them; return the seconds."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    started = time.perf_counter()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    return round(time.perf_counter() - started, 2)


def run_child(command: str, start: Path, end: Path, arguments: argparse.Namespace) -> tuple[float, float, float, float]:
    """Run one conversion in its own process.

    Returns (seconds, peak and initial resident memory in GB, CPU seconds); the times exclude module imports.
    """
    shutil.rmtree(end, ignore_errors=True)
    base = [sys.executable, __file__, "--directory", str(arguments.directory), "--shard-gb", str(arguments.shard_gb)]
    environment = {"THP_MEM_ALLOC_ENABLE": "1", **os.environ}  # as in tools/convert.py
    done = subprocess.run(
        [*base, "--child", command, str(start), str(end)],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def convert(command: str, start: str, end: str, *, shard_bytes: int) -> None:
    """Convert in the child process, and print the measurements as JSON."""
    from megatron_share4v.checkpoint.hf.exporter import export_model
    from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
    from megatron_share4v.checkpoint.hf.source.model import HfSource

    baseline, started, cpu = peak_resident_gb(), time.perf_counter(), time.process_time()
    if command == "import":
        import_model(HfSource(directory=Path(start)), Path(end), options=ImportOptions())
    else:
        export_model(Path(start), Path(end), layout="llava-hf", shard_bytes=shard_bytes)
    print(
        json.dumps(
            [round(time.perf_counter() - started, 2), peak_resident_gb(), baseline, round(time.process_time() - cpu, 2)]
        )
    )


def peak_resident_gb() -> float:
    """Return the peak resident memory of this process so far, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
