"""Command line of tools/plan.py, docs/scaling.md, and workloads measured from prepared data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

RECIPE = "examples/share4v_7b/pretrain.yaml"


def plan(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *arguments], cwd=repository, capture_output=True, text=True, timeout=120
    )


def test_a_plan_with_its_files(repository: Path, tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "plan.json"), "--png", str(tmp_path / "plan.png"))
    done = plan(
        repository,
        RECIPE,
        "--world-size",
        "16",
        "--samples",
        "1246000",
        "parallel.pipeline=2",
        "parallel.virtual=2",
        *files,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("predicted, not measured", "T8+8", "8+8H", "MFU", "GPU-hours", "fastest of", "assumed: H200"):
        assert words in done.stdout, done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    requested = written["requested"]
    assert written["status"] == "predicted, not measured" and not written["refusals"] and len(written["best"]) >= 5
    assert (
        requested["layout"]["pipeline"] == 2
        and requested["layers_per_stage"] == [8, 8, 8, 8]
        and requested["steps"] == 4868
    )
    assert set(requested["memory"][0]) == {"weights", "gradients", "optimizer", "activations", "logits", "workspace"}
    assert Image.open(tmp_path / "plan.png").width == 1000 and (tmp_path / "plan.png").stat().st_size < 60_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--world-size", "24"), ("refused: train.global_batch_size 256 is not a multiple", "fastest of")),
        (
            ("--world-size", "16", "--gpu", "a100", "parallel.tensor=1", "parallel.sequence=false"),
            ("refused: does not fit", "A100", "fastest of"),
        ),
        (
            ("--world-size", "16", "parallel.tensor=3"),
            ("model.language.num_attention_heads 32 is not divisible by parallel.tensor 3",),
        ),
        (("--world-size", "16", "parallel.tensr=2"), ("did you mean 'tensor'?",)),
        (("--world-size", "20000"), ("--world-size 20000: use 1 to 16384",)),
    ],
)
def test_refused_configuration_exits_with_2(
    repository: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = plan(repository, RECIPE, *arguments)
    printed = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in printed, printed
    assert all(word in printed for word in words), printed


def test_the_largest_world_takes_seconds_and_no_torch(repository: Path) -> None:
    begun = time.perf_counter()
    done = plan(
        repository,
        RECIPE,
        "--world-size",
        "16384",
        "loss.normalize=tokens",
        "train.global_batch_size=16384",
        "train.micro_batch_size=1",
    )
    assert "fastest of" in done.stdout and time.perf_counter() - begun < 30, done.stdout + done.stderr
    light = (
        "import sys; sys.argv = ['plan', '--help']\nimport tools.plan\nassert not {'torch', 'megatron.core', "
        "'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", light], cwd=repository, check=True)


def test_scaling_document_matches_the_planner(repository: Path) -> None:
    """Sample rows equal new predictions; after a planner change run python tools/plan_scaling.py."""
    from megatron_share4v.planner import scaling

    page = (repository / "docs" / "scaling.md").read_text(encoding="utf-8")
    for run in (
        scaling.PlannedRun("share4v_13b", "finetune", 64),
        scaling.PlannedRun("share4v_7b", "pretrain", 16, overrides=scaling.TOKENS),
        scaling.packed_runs()[0],
        scaling.packed_runs(scaling.FP8)[0],
    ):
        assert scaling.table_row(run, repository) in page, run
    assert "\n".join(scaling.bench_rows(repository)) in page
    assert scaling.table_row(scaling.long_context_run(65_536), repository).replace("stage 2", "packs of 65,536") in page
    assert page.count("| 7B |") == page.count("| 13B |") + 8 and "predicted, not measured" in page.lower()
    pictures = re.findall(r"\((pictures/\S+\.png)\)", page)
    assert len(pictures) == 4 and all((repository / "docs" / name).stat().st_size < 60_000 for name in pictures)


def test_scaling_tables_recommend_no_layout_with_a_large_bubble(repository: Path) -> None:
    from megatron_share4v.planner.scaling import COLUMNS, MAX_BUBBLE

    rows = re.findall(r"^\| (?:7B|13B) \|.*$", (repository / "docs" / "scaling.md").read_text(encoding="utf-8"), re.M)
    bubbles = [row.split("|")[1 + COLUMNS.index("bubble")].strip() for row in rows]
    assert rows and all(float(bubble.removesuffix("%")) < 100 * MAX_BUBBLE for bubble in bubbles)


def test_prepared_data_are_measured(repository: Path, tmp_path: Path) -> None:
    """Measured workloads of a small run, with and without packing."""
    from examples.quickstart.dataset import write_dataset
    from examples.quickstart.tokenizer import train_tokenizer
    from megatron_share4v.config.load import load_run
    from megatron_share4v.data.prepare.writer import PrepareOptions, prepare
    from megatron_share4v.data.store.index import Index
    from megatron_share4v.planner.prepared_workload import measured_workload
    from megatron_share4v.planner.workload import assumed_workload, has_prepared_data

    write_dataset(tmp_path / "scenes", train_scenes=24, held_out_scenes=64, seed=3, image_size=56)
    annotations = tmp_path / "scenes" / "finetune.json"
    train_tokenizer(
        [turn["value"] for entry in json.loads(annotations.read_text()) for turn in entry["conversations"]],
        tmp_path / "t.model",
        vocab_size=380,
    )
    prepare(
        PrepareOptions(
            annotations=annotations, images=tmp_path / "scenes", output=tmp_path / "data",
            tokenizer=tmp_path / "t.model", template="vicuna_v1",
            max_text_length=384, samples_per_shard=16, max_rejected_fraction=0.0, workers=0, overwrite=False,
        )
    )  # fmt: skip
    tiny = (
        f"data.train={tmp_path / 'data'}",
        "data.max_text_length=384",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "data.order=random",
    )
    config = load_run(repository / "examples/quickstart/finetune.yaml", tiny)
    rows = Index.open(tmp_path / "data").rows
    lengths = rows["n_tok"] + rows["n_img"] * (config.model.vision.num_patches - 1.0)
    assert has_prepared_data(config)
    loose = measured_workload(config)
    assert loose.source.startswith("measured: ") and loose.sequences == len(rows)
    assert loose.longest >= lengths.max() > loose.positions and loose.length < loose.longest + 1
    assert loose.positions == pytest.approx(lengths.mean(), rel=0.25) and loose.images == pytest.approx(
        rows["n_img"].mean(), abs=0.15
    )
    packed = measured_workload(
        load_run(repository / "examples/quickstart/finetune.yaml", [*tiny, "data.pack_length=1024"])
    )
    assert (
        packed.length == packed.longest == 1024
        and packed.sequences < loose.sequences
        and 512 < packed.positions <= 1024
    )
    assert packed.squares == pytest.approx(packed.positions * (lengths**2).sum() / lengths.sum(), rel=0.2)
    assert assumed_workload(config, samples=5).source.startswith("assumed") and packed.head_rows > loose.head_rows
