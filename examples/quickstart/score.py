"""Score the quickstart's model on held-out scenes and print a summary; the last line of the output is one JSON object.

Run by examples/quickstart/run.sh under torchrun; the ranks divide the questions. Exit code 1 when the model has not
learned enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: `examples` is not installed

from megatron_share4v.errors import exit_on_closed_output, exit_on_user_error
from megatron_share4v.files import read_text
from megatron_share4v.parallel.launch import World

MIN_ACCURACY = 0.85
MIN_GAIN = 0.3  # accuracy with the right image minus accuracy with another scene's image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--captions", type=int, default=64, help="number of held-out scenes to caption")
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time at which the quickstart began")
    parser.add_argument(
        "--no-floors", action="store_true", help="accept any scores, for runs that are too short to learn"
    )
    arguments = parser.parse_args()
    world = World.from_environment()
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        results = collect_results(arguments, world)
    if world.rank:
        return
    failures = [] if arguments.no_floors else find_failures(results)
    print(format_summary(results, arguments.out), flush=True)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print(json.dumps(results), flush=True)
    sys.exit(1 if failures else 0)


def collect_results(arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """Score the model and add what the earlier parts of the quickstart wrote; this is the content of the JSON line."""
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
    stage1, stage2 = read_losses(out / "pretrain"), read_losses(out / "finetune")
    return {
        "stage1_layout": read_layout(out / "pretrain"),
        "stage2_layout": read_layout(out / "finetune"),
        "stage1_loss_first": stage1[0],
        "stage1_loss_last": stage1[-1],
        "stage2_loss_first": stage2[0],
        "stage2_loss_last": stage2[-1],
        "held_out": asdict(held_out),
        "served": compare_served(out / "served.json", out / "samples" / "answers.jsonl"),
        "evaluation": read_evaluation(out / "evaluation" / "result.json"),
        "hf_export": json.loads(read_text(out / "hf_export.json")),
        "wall_s": round(time.time() - arguments.started, 1),
    }


def compare_served(served: Path, scored: Path) -> dict[str, Any]:
    """Compare the server's answers with the scored ones, question by question."""
    over_http = json.loads(read_text(served))
    rows = [json.loads(line) for line in read_text(scored).splitlines()][: len(over_http)]
    answers = [(row["question"], row["answer"]) for row in over_http]
    return {"questions": len(over_http), "equal": answers == [(row["question"], row["model"]) for row in rows]}


def read_evaluation(result: Path) -> dict[str, Any]:
    """Read the exact-match accuracy, in percent, that tools/evaluate.py measured."""
    content = json.loads(read_text(result))
    return {
        "benchmark": content["benchmark"],
        "questions": content["questions"],
        "accuracy": round(content["headline"]["value"], 2),
    }


def read_layout(run: Path) -> str:
    """Read the parallel layout of the latest start of a run directory."""
    return str(json.loads(read_text(run / "run_card.json"))["layout"])


def read_losses(run: Path) -> list[float]:
    """Read the training loss of every step of a run directory."""
    return [json.loads(line)["loss"] for line in read_text(run / "metrics.jsonl").splitlines()]


def find_failures(results: dict[str, Any]) -> list[str]:
    """List what the model should have learned and has not, and what disagrees."""
    held_out = results["held_out"]
    accuracy, swapped = held_out["vqa_accuracy"], held_out["vqa_accuracy_image_swapped"]
    failures = []
    if accuracy < MIN_ACCURACY:
        failures.append(f"vqa_accuracy {accuracy} is below {MIN_ACCURACY}")
    if accuracy - swapped < MIN_GAIN:
        failures.append(
            f"vqa_accuracy {accuracy} is less than {MIN_GAIN} above the accuracy with wrong images, {swapped}: "
            "the model does not use the image"
        )
    if not results["served"]["equal"]:
        failures.append(
            "the server's answers differ from the scored ones: compare served.json with samples/answers.jsonl"
        )
    for stage in ("stage1", "stage2"):
        if results[f"{stage}_loss_last"] >= results[f"{stage}_loss_first"]:
            failures.append(f"{stage} loss did not fall")
    return failures


def format_summary(results: dict[str, Any], out: Path) -> str:
    """Format the results as text: what was trained, scores by kind of question, and where to look next."""
    held_out, served, export = results["held_out"], results["served"], results["hf_export"]
    kinds = "\n".join(f"  {kind:<12}{value:6.2f}" for kind, value in held_out["vqa_accuracy_by_kind"].items())
    return f"""
Quickstart finished after {results["wall_s"]:.0f} s.

Training
  stage 1, captions:  loss {results["stage1_loss_first"]:.3f} -> {results["stage1_loss_last"]:.3f} \
({results["stage1_layout"]})
  stage 2, questions: loss {results["stage2_loss_first"]:.3f} -> {results["stage2_loss_last"]:.3f} \
({results["stage2_layout"]})

Accuracy on {held_out["questions"]} questions about scenes that were not trained on
{kinds}
  {"all":<12}{held_out["vqa_accuracy"]:6.2f}   ({held_out["vqa_accuracy_image_swapped"]:.2f} with another scene's image)
Facts stated right in {held_out["captions"]} captions: {held_out["caption_attribute_accuracy"]:.2f}

Checks
  HTTP server: {served["questions"]} answers {"equal to" if served["equal"] else "DIFFERENT from"} the scored ones
  Hugging Face export against transformers: greedy answers {"equal" if export["greedy_equal"] else "DIFFERENT"}, \
largest logit difference {export["max_logit_diff"]:.1e}

Where to look next
  images with the model's captions: {out}/samples/sample_*.png
  every answer:                     {out}/samples/answers.jsonl
  Hugging Face export:              {export["dir"]}
  training curves:                  tensorboard --logdir {out}
  chat with the model in a browser: python tools/serve.py {out}/finetune
"""


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
