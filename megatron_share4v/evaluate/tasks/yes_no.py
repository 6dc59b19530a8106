"""MME and POPE: yes/no questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile, get_field, read_jsonl
from megatron_share4v.evaluate.metrics import mme, pope
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.task import LOADER, MetricValues, PredictionTexts, Task
from megatron_share4v.evaluate.tasks.questions import COCO, SHORT, both, make_docs, playground, read_questions

POPE_SPLITS = ("random", "popular", "adversarial")


def _truth(folder: BenchmarkFolder, items: Sequence[Doc]) -> mme.Truth:
    """Read the ground truth from MME's text files, beside the images or in a folder of their own."""
    truth: dict[tuple[str, str, str], str] = {}
    for subtask in dict.fromkeys(str(item.question_id).split("/")[0] for item in items):
        directory = folder["images"] / subtask
        directory = directory / "questions_answers_YN" if (directory / "images").is_dir() else directory
        files = sorted(directory.glob("*.txt"))
        if not files:
            raise DataError(f"{directory} has no .txt with questions and answers\n{folder.layout}")
        for path in files:
            truth |= mme.parse_truth(subtask, path.name, path.read_text(encoding="utf-8", errors="replace"))
    return truth


def _mme_files(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile = OFFICIAL
) -> Mapping[str, str]:
    answers = [mme.MmeAnswer(str(item.question_id), item.prompt, texts[item.id]) for item in items if item.id in texts]
    return mme.convert(answers, _truth(folder, items), profile=profile)


def _read_mme(folder: BenchmarkFolder) -> Iterator[Doc]:
    items = list(make_docs(folder, read_questions(folder, ending=SHORT)))
    # Check before generation that each question belongs to MME.
    _mme_files(folder, items, {item.id: "" for item in items})
    yield from items


def _measure_mme(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    found = mme.calculate(_mme_files(folder, items, texts, profile), profile=profile)
    return {"perception": found.perception, "cognition": found.cognition} | {
        name: task.score for name, task in found.tasks.items()
    }


def _read_pope(folder: BenchmarkFolder) -> Iterator[Doc]:
    rows = list(read_questions(folder, ending=SHORT))
    for where, row in rows:
        if row.get("category") not in POPE_SPLITS:
            raise DataError(
                f"{where}: category {row.get('category')!r} is none of {', '.join(POPE_SPLITS)}; take the official "
                f"file\n{folder.layout}"
            )
    _labels(folder)
    yield from make_docs(folder, rows)


def _labels(folder: BenchmarkFolder) -> dict[str, list[str]]:
    """Labels by split in file order; the files are JSONL despite their names."""
    return {
        name: [get_field(row, "label", str, where=where) for where, row in read_jsonl(folder[name])]
        for name in POPE_SPLITS
    }


def _measure_pope(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    # The official script pairs answers and labels of a split by their order alone, and drops what is left over.
    said: dict[str, list[str]] = defaultdict(list)
    for item in items:
        if item.id in texts:
            said[item.meta["category"]].append(texts[item.id])
    splits = {name: pope.score(said[name], labels, profile=profile) for name, labels in _labels(folder).items()}
    found = pope.mean(list(splits.values()))
    values = {"f1": found.headline, "accuracy": 100 * found.accuracy, "yes ratio": 100 * found.yes_ratio}
    for name, split in splits.items():
        values |= {
            f"{name} {kind}": 100 * getattr(split, kind)
            for kind in ("f1", "accuracy", "precision", "recall", "yes_ratio")
        }
    return values


TASKS = (
    Task(
        name="mme",
        title="MME",
        folder="MME",
        official=LOADER,
        headline="perception",
        needs=(
            playground("questions", *both("mme.jsonl")),
            RequiredFile(
                "images",
                # ShareGPT4V's script and its documentation disagree about the name.
                (
                    "MME_Benchmark_release/",
                    "MME_Benchmark_release_version/MME_Benchmark/",
                    "MME_Benchmark_release_version/",
                ),
                "by request, see https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
            ),
        ),
        read=_read_mme,
        measure=_measure_mme,
        # What the official calculation.py reads.
        submit=lambda folder, items, texts: {
            f"{name}.txt": text.encode() for name, text in _mme_files(folder, items, texts).items()
        },
    ),
    Task(
        name="pope",
        title="POPE",
        folder="pope",
        official=LOADER,
        headline="f1",
        needs=(
            playground("questions", *both("pope_test.jsonl")),
            *(
                RequiredFile(
                    name, (f"coco/coco_pope_{name}.json",), "https://github.com/AoiDragon/POPE/tree/main/output/coco"
                )
                for name in POPE_SPLITS
            ),
            RequiredFile("images", ("val2014/",), f"{COCO}val2014.zip"),
        ),
        read=_read_pope,
        measure=_measure_pope,
    ),
)
