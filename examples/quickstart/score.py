"""Score the quickstart's model on held-out scenes; the last line of the output is one JSON object. Fails below the floors.

Run by examples/quickstart/run.sh under torchrun: the ranks share the questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from megatron_share4v.errors import exit_on_user_error
from megatron_share4v.parallel.launch import World

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: examples/ is no installed package


VQA_FLOOR, LOOKING_FLOOR = 0.85, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--captions", type=int, default=64, help="held-out scenes to describe")
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time at which the quickstart began")
    parser.add_argument("--no-floors", action="store_true", help="report only: for runs that are too short to learn")
    arguments = parser.parse_args()
    world = World.from_environment()
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        summary = summarise(arguments, world)
    if world.rank:
        return
    failures = [] if arguments.no_floors else below_floors(summary)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print(json.dumps(summary), flush=True)
    sys.exit(1 if failures else 0)


def summarise(arguments: argparse.Namespace, world: World) -> dict:
    """Everything that the quickstart reports."""
    from examples.quickstart.scoring import score
    from megatron_share4v.infer.session import Session
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.launch import process_group
    from megatron_share4v.parallel.layout import Layout

    out = arguments.out
    device = Device.detect(local_rank=world.local_rank, local_world_size=world.local_size)
    with process_group(world, device, timeout_s=600), open_mesh(Layout(data=world.size), device=device) as mesh:
        session = Session.open(out / "finetune", mesh=mesh)
        held_out = score(session, out / "scenes" / "held_out.json", captions=arguments.captions, output=out / "samples")
        parallel = session.config.parallel
    first, second = losses(out / "pretrain"), losses(out / "finetune")
    return {
        "layout": {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": 1},
        "stage1_loss_first": first[0],
        "stage1_loss_last": first[-1],
        "stage2_loss_first": second[0],
        "stage2_loss_last": second[-1],
        "held_out": asdict(held_out),
        "served": compare_served(out / "served.json", out / "samples" / "answers.jsonl"),
        "evaluation": evaluation(out / "evaluation" / "result.json"),
        "hf_export": json.loads((out / "hf_export.json").read_text(encoding="utf-8")),
        "wall_s": round(time.time() - arguments.started, 1),
    }


def compare_served(served: Path, scored: Path) -> dict:
    """Whether the server's answers are those that were scored, question by question."""
    over_http = json.loads(served.read_text(encoding="utf-8"))
    scored_rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()][: len(over_http)]
    return {
        "asked": len(over_http),
        "equal": [(row["question"], row["answer"]) for row in over_http]
        == [(r["question"], r["model"]) for r in scored_rows],
    }


def evaluation(result: Path) -> dict:
    """What tools/evaluate.py found: answers that are right to the letter, in percent."""
    content = json.loads(result.read_text(encoding="utf-8"))
    return {
        "benchmark": content["benchmark"],
        "questions": content["questions"],
        "accuracy": round(content["headline"]["value"], 2),
    }


def losses(run: Path) -> list[float]:
    """Training loss by step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def below_floors(summary: dict) -> list[str]:
    """What the model should have learned and has not."""
    held_out = summary["held_out"]
    right, swapped = held_out["vqa_accuracy"], held_out["vqa_accuracy_image_swapped"]
    problems = []
    if right < VQA_FLOOR:
        problems.append(f"vqa_accuracy {right} is below {VQA_FLOOR}")
    if right - swapped < LOOKING_FLOOR:
        problems.append(
            f"vqa_accuracy {right} is less than {LOOKING_FLOOR} above that with swapped images, {swapped}: the model does not look"
        )
    if not summary["served"]["equal"]:
        problems.append(
            "the server answered other than the model that was scored: compare served.json with samples/answers.jsonl"
        )
    for stage in ("stage1", "stage2"):
        if summary[f"{stage}_loss_last"] >= summary[f"{stage}_loss_first"]:
            problems.append(f"{stage} loss did not fall")
    return problems


if __name__ == "__main__":
    main()
