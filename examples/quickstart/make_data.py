"""Draw the quickstart's scenes, train its tokenizer, and prepare the shards of both stages; existing parts are kept.

The kind of tokenizer, the conversation templates and the lengths are those of the pair's pretrain.yaml and
finetune.yaml.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: `examples` is not installed

from examples.quickstart.dataset import IMAGE_SIZE, finetune_record, load_held_out, pretrain_record, write_dataset
from examples.quickstart.scenes import make_scene
from examples.quickstart.tokenizer import train_byte_bpe, train_tokenizer
from megatron_share4v.config.load import load_run
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.files import read_text
from megatron_share4v.text.template import get_template

VALIDATION_SCENES = 64
STAGES = ("pretrain", "finetune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--configs", type=Path, default=Path("examples/quickstart"), help="folder of pretrain.yaml and finetune.yaml"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the scenes and questions")
    parser.add_argument("--train-scenes", type=int, default=6000)
    parser.add_argument("--held-out-scenes", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="pixels")
    arguments = parser.parse_args()
    with exit_on_user_error():
        make_data(arguments)


def make_data(arguments: argparse.Namespace) -> None:
    """Make every part that does not exist. Raises ConfigError when the existing scenes have another seed."""
    runs = {stage: load_run(arguments.configs / f"{stage}.yaml") for stage in STAGES}
    scenes, tokenizer = arguments.out / "scenes", arguments.out / Path(runs["finetune"].data.tokenizer).name
    if (scenes / "held_out.json").exists():
        check_seed(scenes, arguments.seed)
    else:
        write_dataset(
            scenes,
            train_scenes=arguments.train_scenes,
            held_out_scenes=arguments.held_out_scenes,
            seed=arguments.seed,
            image_size=arguments.image_size,
        )
        write_validation(scenes, arguments.seed)
        write_benchmark(scenes)
    if not tokenizer.exists():
        make_tokenizer(runs["finetune"], scenes, tokenizer)
    for (stage, run), split in itertools.product(runs.items(), ("", "_validation")):
        output = arguments.out / "data" / f"{stage}{split}"
        if not (output / "dataset.json").exists():
            prepare(scenes, f"{stage}{split}.json", output, tokenizer=tokenizer, run=run)


def check_seed(scenes: Path, seed: int) -> None:
    """Raise ConfigError unless the existing scenes were drawn with `seed`."""
    drawn, _ = load_held_out(scenes / "held_out.json")
    existing = drawn[0][0].seed
    if existing != seed:
        raise ConfigError(f"{scenes} was drawn with seed {existing}, not {seed}; use another directory (--out)")


def write_validation(scenes: Path, seed: int) -> None:
    """Write annotations of held-out scenes, for the validation loss of both stages."""
    held_out = [make_scene(seed, "held_out", index) for index in range(VALIDATION_SCENES)]
    for stage, record in (("pretrain", pretrain_record), ("finetune", finetune_record)):
        path = scenes / f"{stage}_validation.json"
        path.write_text(json.dumps([record(scene) for scene in held_out]), encoding="utf-8")


def write_benchmark(scenes: Path) -> None:
    """Write the held-out questions as a custom benchmark, for tools/evaluate.py --benchmark custom."""
    _, questions = load_held_out(scenes / "held_out.json")
    rows = [
        {"question_id": n, "image": q.image, "text": q.question, "answer": q.answer} for n, q in enumerate(questions)
    ]
    (scenes / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer(run: RunConfig, scenes: Path, path: Path) -> None:
    """Train the tokenizer of a run on the text of both stages: sentencepiece, or byte BPE where it is a JSON file."""
    template = run.data.template
    if path.suffix == ".json":
        texts = tokenizer_corpus(scenes, f"{get_template(template).system}\nsystem\nuser\nassistant\n")
        train_byte_bpe(texts, path, family=template)
    else:
        texts = tokenizer_corpus(scenes, f"{get_template(template).system} USER: ASSISTANT:")
        train_tokenizer(texts, path, vocab_size=run.model.language.vocab_size)


def tokenizer_corpus(scenes: Path, frame: str) -> Iterator[str]:
    """Yield the text of every turn of both stages, and for each conversation the words that its template adds."""
    for stage in STAGES:
        for record in json.loads(read_text(scenes / f"{stage}.json")):
            yield frame
            for turn in record["conversations"]:
                yield turn["value"].removeprefix("<image>\n")


def prepare(scenes: Path, annotations: str, output: Path, *, tokenizer: Path, run: RunConfig) -> None:
    """Run tools/prepare_data.py on the annotations of one stage, whose configuration is `run`."""
    options = {
        "--annotations": scenes / annotations,
        "--images": scenes,
        "--output": output,
        "--tokenizer": tokenizer,
        "--template": run.data.template,
        "--max-text-length": run.data.max_text_length,
        "--workers": 0,
    }
    words = [str(word) for option in options.items() for word in option]
    subprocess.run([sys.executable, "tools/prepare_data.py", *words], check=True)


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
