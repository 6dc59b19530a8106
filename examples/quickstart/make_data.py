"""Draw the quickstart's scenes and ask about them, train its tokenizer, and prepare the shards of both stages. What is already there is left alone."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_share4v.text.template import get_template

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: examples/ is no installed package

from examples.quickstart.dataset import finetune_record, load_held_out, make_scene, pretrain_record, write_dataset
from examples.quickstart.tokenizer import train_tokenizer

SEED = 1
VALIDATION_SCENES = 64
MAX_TEXT_LENGTH = 384
STAGES = {"pretrain": "plain", "finetune": "vicuna_v1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--train-scenes", type=int, default=6000)
    parser.add_argument("--held-out-scenes", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=72, help="pixels")
    parser.add_argument("--vocab-size", type=int, default=512)
    arguments = parser.parse_args()
    scenes, tokenizer = arguments.out / "scenes", arguments.out / "tokenizer.model"
    if not (scenes / "held_out.json").exists():
        write_dataset(
            scenes,
            train_scenes=arguments.train_scenes,
            held_out_scenes=arguments.held_out_scenes,
            seed=SEED,
            image_size=arguments.image_size,
        )
        write_validation(scenes)
        write_questions(scenes)
    if not tokenizer.exists():
        train_tokenizer(corpus(scenes), tokenizer, vocab_size=arguments.vocab_size)
    for (stage, template), split in itertools.product(STAGES.items(), ("", "_validation")):
        output = arguments.out / "data" / f"{stage}{split}"
        if not (output / "dataset.json").exists():
            prepare(scenes, f"{stage}{split}.json", output, tokenizer=tokenizer, template=template)


def write_validation(scenes: Path) -> None:
    """Annotations of held-out scenes, for the validation loss."""
    held_out = [make_scene(SEED, "held_out", number) for number in range(VALIDATION_SCENES)]
    for stage, record in (("pretrain", pretrain_record), ("finetune", finetune_record)):
        (scenes / f"{stage}_validation.json").write_text(
            json.dumps([record(scene) for scene in held_out]), encoding="utf-8"
        )


def write_questions(scenes: Path) -> None:
    """The held-out questions as a benchmark of one's own, for tools/evaluate.py --benchmark custom."""
    _, questions = load_held_out(scenes / "held_out.json")
    rows = [
        {"question_id": n, "image": q.image, "text": q.question, "answer": q.answer} for n, q in enumerate(questions)
    ]
    (scenes / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def corpus(scenes: Path) -> Iterator[str]:
    """Every turn of both stages, with the words that the conversation template puts around them."""
    system = get_template(STAGES["finetune"]).system
    for stage in STAGES:
        for record in json.loads((scenes / f"{stage}.json").read_text(encoding="utf-8")):
            yield f"{system} USER: ASSISTANT:"
            for turn in record["conversations"]:
                yield turn["value"].removeprefix("<image>\n")


def prepare(scenes: Path, annotations: str, output: Path, *, tokenizer: Path, template: str) -> None:
    """tools/prepare_data.py, as a user would call it."""
    command = [
        sys.executable,
        "tools/prepare_data.py",
        "--annotations",
        scenes / annotations,
        "--images",
        scenes,
        "--output",
        output,
    ]
    options = [
        "--tokenizer",
        tokenizer,
        "--template",
        template,
        "--max-text-length",
        str(MAX_TEXT_LENGTH),
        "--workers",
        "0",
    ]
    subprocess.run([*command, *options], check=True)


if __name__ == "__main__":
    main()
