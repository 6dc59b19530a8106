"""tools/train.py under torchrun at TP 2 x PP 2: kill and resume, resume at another layout, bad input."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from forked_tools import run_tool
from launching import finish, fork, killed_after, lines, start
from tolerances import RESUME_OTHER_LAYOUT_LOSS

from megatron_share4v.observability.goodput import ACCOUNTS
from megatron_share4v.ops.build import find_toolchain

STEPS, EVERY = 10, 5


@dataclass(frozen=True)
class Bench:
    """A prepared data set, its tokenizer and the YAML file of a run."""

    root: Path
    config: Path
    data: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Bench:
    from examples.quickstart.dataset import write_dataset
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare

    root = tmp_path_factory.mktemp("run")
    write_dataset(root / "scenes", train_scenes=40, held_out_scenes=64, seed=3, image_size=56)
    annotations = root / "scenes" / "finetune.json"  # text-only records among those with images
    texts = [turn["value"] for record in json.loads(annotations.read_text()) for turn in record["conversations"]]
    train_tokenizer(texts, root / "tokenizer.model", vocab_size=400)
    train_tokenizer(reversed(texts[:200]), root / "other.model", vocab_size=380)
    prepare(
        PrepareOptions(
            annotations=annotations,
            images=root / "scenes",
            output=root / "data",
            tokenizer=root / "tokenizer.model",
            template="vicuna_v1",
            max_text_length=400,
            samples_per_shard=16,
            max_rejected_fraction=0.0,
            workers=0,
            overwrite=False,
        )
    )
    config = root / "run.yaml"
    content = {
        "run": {"directory": str(root / "unset"), "seed": 5},
        "model": {"base": str(repository / "examples" / "models" / "tiny.yaml"), "trainable": {"vision_from_block": 1}},
        "precision": {"dtype": "fp32"},
        "data": {
            "train": str(root / "data"),
            "validation": str(root / "data"),
            "tokenizer": str(root / "tokenizer.model"),
            "max_text_length": 400,
            "order": "group_by_modality_length",
            "num_workers": 0,
        },
        "optim": {"learning_rate": 1e-3},
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "steps": STEPS,
            "validate_every_steps": 5,
            "validation_batches": 1,
            "preview_every_steps": 10,
            "preview_samples": 3,
            "preview_tokens": 4,
        },
        "checkpoint": {"every_steps": EVERY},
        "log": {"sample_keys": True},
    }
    config.write_text(yaml.safe_dump(content))
    return Bench(root, config, root / "data")


T2P2 = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> Path:
    """Train ten steps at TP 2 x PP 2 without interruption."""
    directory = bench.root / "uninterrupted"
    profile = ("log.profile.first_step=3", "log.profile.last_step=4", "log.profile.memory=true")
    output = finish(start(bench.config, 4, f"run.directory={directory}", *T2P2, *profile))
    assert "tensor 2 x pipeline 2" in output and "ETA" in output and "vision" in output
    assert len(re.findall("fused ops: (?:native|reference)", output)) == 1
    return directory


def test_run_directory(uninterrupted: Path) -> None:
    metrics = lines(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    wanted = "step loss grad_norm learning_rate consumed_samples trained_tokens tokens images "
    wanted += "padding_fraction step_time_s data_wait_s"
    wanted += " tokens_per_s_per_gpu model_tflops_per_s_per_gpu mfu peak_memory_bytes skipped"
    assert set(wanted.split()) <= metrics[0].keys()
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert [line["step"] for line in metrics if line["validation_loss"] is not None] == [5, 10]
    assert 0 <= metrics[0]["padding_fraction"] < 0.5 and metrics[0]["consumed_samples"] == 8
    assert (uninterrupted / "config.yaml").exists() and len(list((uninterrupted / "log").glob("rank*.txt"))) == 4
    assert json.loads((uninterrupted / "ops.json").read_text())["ops"] == (
        "reference" if find_toolchain() is None else "native"
    )
    assert json.loads((uninterrupted / "attention.json").read_text()) == {
        "attention": "sdpa",
        "on": "cpu",
        "reason": "samples are not packed",
    }
    assert (uninterrupted / "checkpoints" / "latest").read_text().strip() == "step_00000010"
    assert "answer" in " ".join(_board_tags(uninterrupted)) and {"preview/image", "preview/exact_match"} <= set(
        _board_tags(uninterrupted)
    )


def test_time_accounting(uninterrupted: Path) -> None:
    """Check that all seconds are accounted, communication is measured, and hardware FLOPs exceed model FLOPs."""
    metrics = lines(uninterrupted / "metrics.jsonl")
    for before, line in itertools.pairwise(metrics):
        assert sum(line[name] for name in ACCOUNTS) == pytest.approx(line["time"] - before["time"], abs=1e-3)
    assert metrics[0]["restart_s"] > 0.5 and not any(line["restart_s"] for line in metrics[1:])
    assert all(0 < line["exposed_communication_s"] < line["step_time_s"] for line in metrics)
    assert metrics[EVERY]["checkpoint_s"] > 0 and 0 < metrics[-1]["goodput"] < 1
    assert all(line["hardware_tflops_per_s_per_gpu"] > line["model_tflops_per_s_per_gpu"] for line in metrics)
    assert {"goodput/compute_s", "goodput/goodput"} <= set(
        _board_tags(uninterrupted)
    ) and "goodput/time" not in _board_tags(uninterrupted)
    assert (uninterrupted / "goodput.png").stat().st_size > 1000


def test_profile_of_some_steps(uninterrupted: Path) -> None:
    """Check the trace of each rank and its allocations."""
    for rank in range(4):
        [trace] = (uninterrupted / "profile" / f"rank{rank}").glob("*.json")
        events = json.loads(trace.read_text())["traceEvents"]
        names = [event.get("name", "") for event in events]
        assert trace.name == "steps_3_4.json" and "aten::mm" in names and "[memory]" in names


def _board_tags(directory: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    return [*tags["images"], *tags["tensors"], *tags["scalars"]]


def test_resume_after_kill_is_bitwise_equal(bench: Bench, uninterrupted: Path) -> None:
    directory = bench.root / "killed"
    process = fork(bench.config, 4, f"run.directory={directory}", *T2P2, script=killed_after(7))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, output
    assert EVERY < len(lines(directory / "metrics.jsonl")) < STEPS
    output = finish(fork(bench.config, 4, f"run.directory={directory}", *T2P2))
    assert "resumed from" in output and "at step 5" in output
    actual, reference = lines(directory / "metrics.jsonl"), lines(uninterrupted / "metrics.jsonl")
    assert actual[EVERY]["lost_s"] > 0 and actual[EVERY]["restart_s"] > 0.5
    exact = ("step", "loss", "grad_norm", "learning_rate", "validation_loss", "consumed_samples", "trained_tokens")
    assert [[line[name] for name in exact] for line in actual] == [[line[name] for name in exact] for line in reference]
    assert lines(directory / "samples.jsonl") == lines(uninterrupted / "samples.jsonl")
    assert _weights(bench, directory) == _weights(bench, uninterrupted)


def _weights(bench: Bench, directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of the last checkpoint."""
    import hashlib

    checkpoint = directory / "checkpoints" / "step_00000010"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(checkpoint.glob("*.distcp"))}


def test_resume_at_another_layout_trains_the_same_samples(bench: Bench, uninterrupted: Path) -> None:
    """Resume with DP 2 a TP 2 x PP 2 x DP 1 run that run.exit_at_step ended, with the schedule of all steps."""
    directory = bench.root / "half"
    output = finish(fork(bench.config, 4, f"run.directory={directory}", *T2P2, f"run.exit_at_step={EVERY}"))
    assert f"ended by run.exit_at_step after step {EVERY} of {STEPS}" in output
    ended, reference = lines(directory / "metrics.jsonl"), lines(uninterrupted / "metrics.jsonl")
    assert [line["loss"] for line in ended] == [line["loss"] for line in reference[:EVERY]]
    assert [line["learning_rate"] for line in ended] == [line["learning_rate"] for line in reference[:EVERY]]
    assert "nothing to do" in finish(fork(bench.config, 2, f"run.directory={directory}", f"run.exit_at_step={EVERY}"))
    output = finish(fork(bench.config, 2, f"run.directory={directory}"))
    assert "at step 5" in output and "data 2" in output
    assert lines(directory / "samples.jsonl") == lines(uninterrupted / "samples.jsonl")
    reference = {line["step"]: line["loss"] for line in lines(uninterrupted / "metrics.jsonl")}
    assert [line["step"] for line in lines(directory / "metrics.jsonl")] == list(reference)
    for line in lines(directory / "metrics.jsonl"):
        assert abs(line["loss"] - reference[line["step"]]) < RESUME_OTHER_LAYOUT_LOSS


def test_reference_ops_are_used_and_reported_without_a_compiler(bench: Bench) -> None:
    """Train without a compiler, as a fresh clone may, then resume the run with one."""
    directory = bench.root / "uncompiled"
    few = (
        f"run.directory={directory}",
        "train.preview_every_steps=0",
        "train.validate_every_steps=0",
        "checkpoint.every_steps=0",
    )
    output = finish(fork(bench.config, 1, "train.steps=2", *few, path=""))
    assert "fused ops: reference (no C++ compiler" in output and len(lines(directory / "metrics.jsonl")) == 2
    record = json.loads((directory / "ops.json").read_text())
    assert record["ops"] == "reference" and "no C++ compiler" in record["reason"]
    message = refused(bench, "ops=native", "train.steps=2", *few, path="")
    assert (
        "error: ops: native was requested on cpu" in message
        and "install g++" in message
        and "or set ops: reference" in message
    )
    if find_toolchain() is not None:
        output = finish(fork(bench.config, 1, "ops=native", "train.steps=3", "checkpoint.accept_changes=true", *few))
        assert (
            "the fused ops differ from those before in this run" in output and "ops was reference, is native" in output
        )


def test_fp8_divergence_check(bench: Bench) -> None:
    """Train with a limit that FP8 meets, and with one that it cannot meet."""
    few = (
        "train.preview_every_steps=0",
        "train.validate_every_steps=0",
        "checkpoint.every_steps=0",
        "precision.fp8=tensorwise",
    )
    directory = bench.root / "fp8"
    output = finish(
        fork(
            bench.config,
            1,
            f"run.directory={directory}",
            "train.steps=3",
            "precision.guard_every_steps=2",
            "precision.fp8_last_layers=1",
            *few,
        )
    )
    assert "FP8: tensorwise, without the first 0 and the last 1 layers" in output
    gaps = [(line["fp8_loss_gap"], line["fp8_norm_gap"]) for line in lines(directory / "metrics.jsonl")]
    assert gaps[1] == (None, None) and all(0 < gap < 0.02 for gap in (gaps[0][0], gaps[2][0]))
    message = refused(
        bench,
        f"run.directory={bench.root / 'far'}",
        "precision.guard_every_steps=1",
        "precision.guard_loss_gap=1e-9",
        *few,
    )
    assert "before step 1: FP8 (tensorwise): loss is" in message and "This step was not trained" in message
    message = refused(
        bench,
        f"run.directory={bench.root / 'engine'}",
        "precision.fp8=delayed",
        "transformer_engine=language",
        "precision.dtype=bf16",
    )
    assert "transformer_engine: language was requested: this torch is built without CUDA; install it" in message


def refused(bench: Bench, *overrides: str, path: str | None = None) -> str:
    process = fork(bench.config, 1, *overrides, path=path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output, output
    assert output.count("error: ") == 1, output
    return output


def test_bad_configuration_is_refused(bench: Bench) -> None:
    message = refused(bench, "parallel.tensr=2", "train.steps=two")
    assert "did you mean 'tensor'?" in message and "train.steps" in message
    assert "last_step 2 comes before first_step 3" in refused(
        bench, "log.profile.first_step=3", "log.profile.last_step=2"
    )
    message = refused(
        bench, "attention=te", f"run.directory={bench.root / 'no_engine'}", "data.pack_length=512", "data.order=random"
    )
    assert "attention: te was requested on cpu: this torch is built without CUDA; install it" in message
    message = refused(bench, "parallel.tensor=2")
    assert "world size 1 is not a multiple of" in message
    message = refused(
        bench, "parallel.layout=[3, 3]", "parallel.pipeline=2", "data.pad_to=micro_batch", "parallel.virtual=2"
    )
    assert "names 2 stages; pipeline 2 x virtual 2 has 4" in message
    message = refused(bench, "parallel.tensor=8")
    assert "model.language.num_attention_heads 4 is not divisible by parallel.tensor 8" in message
    message = refused(bench, f"data.tokenizer={bench.root / 'other.model'}", f"run.directory={bench.root / 'refused'}")
    assert "tokenizer is" in message and "prepared with" in message


def test_bad_data_is_refused(bench: Bench) -> None:
    damaged = bench.root / "damaged"
    shutil.copytree(bench.data, damaged)
    shard = sorted(damaged.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    message = refused(bench, f"data.train={damaged}", f"run.directory={bench.root / 'refused'}")
    assert shard.name in message and "5000 bytes" in message
    shard.unlink()
    message = refused(bench, f"data.train={damaged}", f"run.directory={bench.root / 'refused'}")
    assert f"{shard.name} is missing" in message


def test_corrupt_checkpoint_is_refused_or_skipped(bench: Bench, uninterrupted: Path) -> None:
    """Refuse a damaged checkpoint that is named explicitly; on a resume, warn and use the previous one."""
    directory = bench.root / "corrupt"
    shutil.copytree(uninterrupted, directory)
    victim = max((directory / "checkpoints" / "step_00000010").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    named = directory / "checkpoints" / "step_00000010"
    message = refused(bench, f"checkpoint.initialize_from={named}", f"run.directory={bench.root / 'refused'}")
    assert victim.name in message
    output = finish(fork(bench.config, 1, f"run.directory={directory}"))
    assert "passed over" in output and victim.name in output and "at step 5" in output


def test_mismatched_image_placeholders_are_refused(bench: Bench) -> None:
    record = json.loads((bench.root / "scenes" / "finetune.json").read_text())[0]
    record["conversations"][2]["value"] = "<image>\n" + record["conversations"][2]["value"]
    annotations = bench.root / "two_placeholders.json"
    annotations.write_text(json.dumps([record]))
    arguments = [
        f"--annotations={annotations}",
        f"--images={bench.root / 'scenes'}",
        f"--output={bench.root / 'never'}",
    ]
    done = run_tool("tools/prepare_data.py", *arguments, f"--tokenizer={bench.root / 'tokenizer.model'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "placeholder" in done.stderr + "".join(
        path.read_text() for path in bench.root.glob("never*/**/rejected.jsonl")
    )
