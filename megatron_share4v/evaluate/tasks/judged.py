"""LLaVA-Bench-in-the-Wild and MM-Vet: free-form answers graded by a judge model.

Prompts are in judge_prompts.py, requests in judge.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.answers import answer_id
from megatron_share4v.evaluate.benchmark_files import (
    BenchmarkFolder,
    RequiredFile,
    get_field,
    read_json,
    read_jsonl,
    require,
)
from megatron_share4v.evaluate.judge_prompts import Grade, JudgeReplies, Review
from megatron_share4v.evaluate.metrics import llava_bench, mm_vet
from megatron_share4v.evaluate.metrics.profile import OFFICIAL, Profile
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.task import (
    CROPPED,
    LEFT_OUT,
    OFFICIAL_STOPS,
    JudgeSpec,
    MetricValues,
    PredictionTexts,
    Task,
    encode_json,
    encode_jsonl,
)
from megatron_share4v.evaluate.tasks.questions import make_docs, playground, read_questions, warn_of_differences

CATEGORIES = ("conv", "detail", "complex")
UNREADABLE_REVIEWS, UNREADABLE_GRADES = "all, unreadable reviews", "unreadable grades"
_WILD = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_VET = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"


def _read_wild(folder: BenchmarkFolder) -> Iterator[Doc]:
    contexts = {
        get_field(row, "image", str, where=where): get_field(row, "caption", (str, list), where=where)
        for where, row in read_jsonl(folder["contexts"])
    }
    references = {
        get_field(row, "question_id", int, where=where): row for where, row in read_jsonl(folder["references"])
    }
    rows, meta = list(read_questions(folder)), {}
    for where, row in rows:
        reference = references.get(row["question_id"], {})
        if row["image"] not in contexts or row.get("category") not in CATEGORIES or "text" not in reference:
            raise DataError(
                f"{where}: question {row['question_id']} needs a category ({', '.join(CATEGORIES)}), a context of its "
                f"image {row['image']} and a "
                f"reference answer; take all files of one release\n{folder.layout}"
            )
        caption = contexts[row["image"]]
        context = "\n".join(caption) if isinstance(caption, list) else caption
        meta[str(row["question_id"])] = {
            "category": f"llava_bench_{row['category']}",
            "context": context,
            "reference": reference,
        }
    references_of = (
        (where, row["text"], str(references[row["question_id"]].get("prompt", row["text"]))) for where, row in rows
    )
    warn_of_differences(f"{folder['references']}, prompt", references_of)
    yield from make_docs(folder, rows, meta)


def _wild_requests(items: Sequence[Doc], texts: PredictionTexts, profile: Profile) -> list[Review]:
    return [
        Review(item.id, item.meta["context"], item.prompt, item.meta["reference"]["text"], texts[item.id])
        for item in items
        if item.id in texts
    ]


def _measure_wild(items: Sequence[Doc], verdicts: JudgeReplies, profile: Profile) -> MetricValues:
    judged = [item for item in items if verdicts.get(item.id)]
    scores = [llava_bench.parse_review(verdicts[item.id][0], profile=profile) for item in judged]
    found = llava_bench.summarise(
        [llava_bench.Review(item.meta["category"], pair) for item, pair in zip(judged, scores)], profile=profile
    )
    values: dict[str, float] = {}
    for name, one in found.by_category.items():
        values |= {
            name: one.relative,
            f"{name}, reference": one.reference,
            f"{name}, model": one.model,
            f"{name}, unreadable reviews": float(one.failed),
        }
    return values


def _wild_files(
    items: Sequence[Doc], texts: PredictionTexts, verdicts: JudgeReplies, judge: str
) -> Mapping[str, bytes]:
    """Review file that the official summarize_gpt_review.py reads."""
    rows = []
    for number, item in enumerate((item for item in items if verdicts.get(item.id)), 1):
        review, reference = verdicts[item.id][0], item.meta["reference"]
        head = {
            "id": number,
            "question_id": item.question_id,
            "answer1_id": reference.get("answer_id", item.question_id),
        }
        head |= {"answer2_id": answer_id(item.id, texts[item.id]), "category": item.meta["category"], "content": review}
        rows.append(head | {"tuple": list(llava_bench.parse_review(review))})
    return {"reviews.jsonl": encode_jsonl(rows)}


def _name(item: Doc) -> str:
    return f"v1_{item.question_id}"


def _read_vet(folder: BenchmarkFolder) -> Iterator[Doc]:
    truths, rows = read_json(folder["annotations"], dict), list(read_questions(folder))
    for item in make_docs(folder, rows):
        where = f"{folder['annotations']}, {_name(item)}"
        truth = get_field(truths, _name(item), dict, where=where)
        require(truth, where=where, question=str, answer=str, capability=list)
        yield Doc(id=item.id, question_id=item.question_id, prompt=item.prompt, image=item.image, meta=truth)
    questions = ((where, row["text"], truths[f"v1_{row['question_id']}"]["question"]) for where, row in rows)
    warn_of_differences(f"{folder['annotations']}, question", questions)


def _vet_requests(items: Sequence[Doc], texts: PredictionTexts, profile: Profile) -> list[Grade]:
    return [
        Grade(item.id, item.meta["question"], item.meta["answer"], texts[item.id], profile)
        for item in items
        if item.id in texts
    ]


def _measure_vet(items: Sequence[Doc], verdicts: JudgeReplies, profile: Profile) -> MetricValues:
    found = {item.id: mm_vet.first_grade(verdicts[item.id], profile=profile) for item in items if verdicts.get(item.id)}
    unreadable = [name for name, grade in found.items() if grade is None]
    left_out = set() if profile is OFFICIAL else set(unreadable)  # the official script gives 0.0
    graded = {name: [grade or 0.0] for name, grade in found.items() if name not in left_out}
    values: dict[str, float] = {UNREADABLE_GRADES: float(len(unreadable))}
    if found and not graded:
        return {"total": math.nan} | values
    scores = mm_vet.aggregate(graded, {item.id: item.meta["capability"] for item in items if item.id not in left_out})
    values = {"total": scores.total, **scores.by_capability} | values
    return values | {f"together {name}": value for name, value in scores.by_combination.items()}


def _submit_vet(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> Mapping[str, bytes]:
    return {"mm-vet.json": encode_json({_name(item): texts[item.id] for item in items if item.id in texts}, indent=2)}


def _vet_files(items: Sequence[Doc], texts: PredictionTexts, verdicts: JudgeReplies, judge: str) -> Mapping[str, bytes]:
    """Grade file of the official evaluator, from which it resumes."""
    grades = {}
    for item in items:
        if replies := verdicts.get(item.id):
            grades[_name(item)] = {
                "model": [judge],
                "content": [replies[-1].split(" ")[0].strip()],
                "score": [mm_vet.grade(replies)],
            }
    return {"mm-vet-grade-1runs.json": encode_json(grades, indent=4)}


TASKS = (
    Task(
        name="llava_bench",
        title="LLaVA-Bench (in the wild)",
        folder="llava-bench-in-the-wild",
        official=CROPPED,
        headline="all",
        needs=(
            RequiredFile("questions", ("questions.jsonl",), _WILD),
            RequiredFile("contexts", ("context.jsonl",), _WILD),
            RequiredFile("references", ("answers_gpt4.jsonl",), _WILD),
            RequiredFile("images", ("images/",), _WILD),
        ),
        read=_read_wild,
        missing=LEFT_OUT,
        judged=JudgeSpec(
            "gpt-4-0314", _wild_requests, _measure_wild, _wild_files, UNREADABLE_REVIEWS, "counts -1 for both answers"
        ),
    ),
    Task(
        name="mm_vet",
        title="MM-Vet",
        folder="mm-vet",
        official=CROPPED,
        headline="total",
        needs=(
            playground("questions", "share4v-mm-vet.jsonl", "llava-mm-vet.jsonl"),
            RequiredFile("annotations", ("mm-vet.json", "resources/mm-vet.json"), _VET),
            RequiredFile("images", ("resources/images/", "images/"), _VET),
        ),
        read=_read_vet,
        missing=OFFICIAL_STOPS,
        submit=_submit_vet,
        judged=JudgeSpec("gpt-4-0613", _vet_requests, _measure_vet, _vet_files, UNREADABLE_GRADES, "counts 0 points"),
    ),
)
