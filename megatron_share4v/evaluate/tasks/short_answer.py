"""VQA-v2, GQA, VizWiz, TextVQA: short answers compared with those of annotators or of a scene graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_share4v.errors import DataError
from megatron_share4v.evaluate.benchmark_files import BenchmarkFolder, RequiredFile, get_field, read_json, read_jsonl
from megatron_share4v.evaluate.directives import SHORT, UNANSWERABLE
from megatron_share4v.evaluate.metrics import gqa, vqa
from megatron_share4v.evaluate.metrics.profile import Profile
from megatron_share4v.evaluate.metrics.vqa_answers import normalise_evalai
from megatron_share4v.evaluate.records import Doc
from megatron_share4v.evaluate.task import (
    LEFT_OUT,
    LOADER,
    OFFICIAL_STOPS,
    MetricValues,
    PredictionTexts,
    Task,
    encode_json,
)
from megatron_share4v.evaluate.tasks.questions import (
    COCO,
    both,
    make_docs,
    playground,
    read_questions,
    warn_of_differences,
)

_VQA = "https://visualqa.org/download.html"
_TEST, _VAL = "test-dev2015", "val2014"


def _read_vqav2(folder: BenchmarkFolder) -> Iterator[Doc]:
    if folder.split == _TEST:
        yield from make_docs(folder, read_questions(folder, ending=SHORT))
        return
    content = read_json(folder["annotations"], dict)
    truths = {
        get_field(row, "question_id", int, where=str(folder["annotations"])): row
        for row in get_field(content, "annotations", list, where="annotations")
    }
    where = str(folder["questions"])
    for row in get_field(read_json(folder["questions"], dict), "questions", list, where=where):
        name = get_field(row, "question_id", int, where=where)
        if name not in truths:
            raise DataError(f"{where}: question {name} is not in {folder['annotations']}; take both files of one split")
        picture = get_field(row, "image_id", int, where=where)
        if truths[name].get("image_id", picture) != picture:
            raise DataError(
                f"{where}: question {name} is about image {picture}, and in {folder['annotations']} about "
                f"{truths[name]['image_id']}; take both files of one split"
            )
        image = folder.image(f"COCO_{folder.split}_{picture:012}.jpg")
        yield Doc(
            id=str(name),
            question_id=name,
            prompt=get_field(row, "question", str, where=where) + SHORT,
            image=image,
            meta=truths[name],
        )


def _vqa_items(items: Sequence[Doc], texts: PredictionTexts) -> list[vqa.VqaItem]:
    """Build scoring items; a missing prediction counts as an empty one, as in submissions."""
    result = []
    for item in items:
        truth = item.meta
        answers = [str(answer["answer"] if isinstance(answer, dict) else answer) for answer in truth["answers"]]
        result.append(
            vqa.VqaItem(texts.get(item.id, ""), answers, truth.get("question_type", ""), truth.get("answer_type", ""))
        )
    return result


def _measure_vqav2(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    found = vqa.vqa_accuracy(_vqa_items(items, texts), profile=profile)
    return {"accuracy": found.overall} | {f"answer type {kind}": value for kind, value in found.by_answer_type.items()}


def _submit_vqav2(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> Mapping[str, bytes]:
    # EvalAI requires an answer to every question of test2015; those outside test-dev are empty.
    path = folder["all"]
    if path.suffix == ".json":
        names = [
            get_field(row, "question_id", int, where=str(path))
            for row in get_field(read_json(path, dict), "questions", list, where=str(path))
        ]
    else:
        names = [get_field(row, "question_id", int, where=where) for where, row in read_jsonl(path)]
    predictions = {item.question_id: texts[item.id] for item in items if item.id in texts}
    return {
        "vqav2_test2015.json": encode_json(
            [
                {"question_id": name, "answer": normalise_evalai(predictions[name]) if name in predictions else ""}
                for name in names
            ]
        )
    }


def _read_gqa(folder: BenchmarkFolder) -> Iterator[Doc]:
    truths = read_json(folder["annotations"], dict)
    rows = list(read_questions(folder, ending=SHORT))
    meta = {}
    for where, row in rows:
        truth = truths.get(str(row["question_id"]))
        if truth is None:
            raise DataError(
                f"{where}: question {row['question_id']} is not in {folder['annotations']}; take the files of "
                "testdev_balanced"
            )
        get_field(truth, "answer", str, where=f"{folder['annotations']}, {row['question_id']}")
        meta[str(row["question_id"])] = truth
    questions = (
        (where, row["text"], meta[str(row["question_id"])].get("question", row["text"])) for where, row in rows
    )
    warn_of_differences(f"{folder['annotations']}, question", questions)
    yield from make_docs(folder, rows, meta)


def _measure_gqa(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    questions = [
        gqa.GqaQuestion(
            item.id,
            item.meta["answer"],
            item.meta.get("types", {}).get("structural", ""),
            item.meta.get("isBalanced", True),
        )
        for item in items
    ]
    found = gqa.score(questions, {name: gqa.convert(text) for name, text in texts.items()})
    return {"accuracy": found.accuracy, "binary": found.binary, "open": found.open} | {
        f"structure {k}": v for k, v in found.by_structure.items()
    }


def _submit_gqa(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> Mapping[str, bytes]:
    rows = [
        {"questionId": item.question_id, "prediction": gqa.convert(texts[item.id])}
        for item in items
        if item.id in texts
    ]
    return {"testdev_balanced_predictions.json": encode_json(rows)}


def _read_vizwiz(folder: BenchmarkFolder) -> Iterator[Doc]:
    if folder.split == "test":
        yield from make_docs(folder, read_questions(folder, ending=UNANSWERABLE + SHORT))
        return
    where = str(folder["annotations"])
    for number, row in enumerate(read_json(folder["annotations"], list)):
        get_field(row, "answers", list, where=f"{where}, entry {number}")
        name, question = (get_field(row, key, str, where=f"{where}, entry {number}") for key in ("image", "question"))
        yield Doc(
            id=str(number),
            question_id=number,
            prompt=question + UNANSWERABLE + SHORT,
            image=folder.image(name),
            meta=row,
        )


def _measure_vizwiz(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    return {"accuracy": vqa.vizwiz_accuracy(_vqa_items(items, texts)).accuracy}


def _submit_vizwiz(folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts) -> Mapping[str, bytes]:
    missing = [item.question_id for item in items if item.id not in texts]
    if missing:  # the official converter asserts it
        raise DataError(
            f"VizWiz: no answer to {len(missing)} of {len(items)} questions, the first is {missing[0]}; the server "
            "wants all"
        )
    return {
        f"vizwiz_{folder.split}.json": encode_json(
            [{"image": i.meta["image"], "answer": normalise_evalai(texts[i.id])} for i in items]
        )
    }


def _read_textvqa(folder: BenchmarkFolder) -> Iterator[Doc]:
    where, truths = str(folder["annotations"]), {}
    for row in get_field(read_json(folder["annotations"], dict), "data", list, where=where):
        get_field(row, "answers", list, where=where)
        truths[get_field(row, "image_id", str, where=where), get_field(row, "question", str, where=where).lower()] = row
    # The official key: image and question, from the prompt's first line. OCR tokens are in the text already: without
    # them the score is ~12 lower.
    for item in make_docs(folder, read_questions(folder, ending=SHORT)):
        truth = truths.get((str(item.question_id), vqa.textvqa_question(item.prompt)))
        if truth is None:
            raise DataError(
                f"{folder['questions']}: {item.question_id}, {item.prompt.splitlines()[0]!r} is not in {where}; take "
                "TextVQA 0.5.1 val"
            )
        yield Doc(id=item.id, question_id=item.question_id, prompt=item.prompt, image=item.image, meta=truth)


def _measure_textvqa(
    folder: BenchmarkFolder, items: Sequence[Doc], texts: PredictionTexts, profile: Profile
) -> MetricValues:
    answered = [item for item in items if item.id in texts]  # the official script goes over the answers that there are
    return {"accuracy": vqa.textvqa_accuracy(_vqa_items(answered, texts), profile=profile).accuracy}


def _loader(**more: Any) -> Task:
    return Task(official=LOADER, headline="accuracy", **more)


TASKS = (
    _loader(
        name="vqav2",
        title="VQA-v2",
        folder="vqav2",
        splits=(_TEST, _VAL),
        scored=(_VAL,),
        needs=(
            playground("questions", *both("vqav2_mscoco_test-dev2015.jsonl"), splits=(_TEST,)),
            RequiredFile("questions", ("v2_OpenEnded_mscoco_val2014_questions.json",), _VQA, (_VAL,)),
            # The official converter asks for LLaVA's name whoever's playground it is.
            RequiredFile(
                "all",
                (*both("vqav2_mscoco_test2015.jsonl")[::-1], "v2_OpenEnded_mscoco_test2015_questions.json"),
                f"eval.zip of LLaVA, or {_VQA}",
                (_TEST,),
            ),
            RequiredFile("annotations", ("v2_mscoco_val2014_annotations.json",), _VQA, (_VAL,)),
            RequiredFile("images", ("test2015/",), f"{COCO}test2015.zip", (_TEST,)),
            RequiredFile("images", ("val2014/",), f"{COCO}val2014.zip", (_VAL,)),
        ),
        read=_read_vqav2,
        measure=_measure_vqav2,
        submit=lambda folder, items, texts: _submit_vqav2(folder, items, texts) if folder.split == _TEST else {},
        server="https://eval.ai/web/challenges/challenge-page/830 (phase test-dev)",
    ),
    _loader(
        name="gqa",
        title="GQA",
        folder="gqa",
        needs=(
            playground("questions", *both("gqa_testdev_balanced.jsonl")),
            RequiredFile(
                "annotations",
                ("data/testdev_balanced_questions.json", "testdev_balanced_questions.json"),
                "questions1.2.zip of https://cs.stanford.edu/people/dorarad/gqa/download.html",
            ),
            RequiredFile("images", ("images/", "data/images/"), "images.zip of the same page"),
        ),
        read=_read_gqa,
        measure=_measure_gqa,
        missing=OFFICIAL_STOPS,
        submit=_submit_gqa,
    ),
    _loader(
        name="vizwiz",
        title="VizWiz",
        folder="vizwiz",
        splits=("test", "val"),
        scored=("val",),
        needs=(
            playground("questions", *both("test.jsonl"), splits=("test",)),
            RequiredFile(
                "annotations",
                ("val.json",),
                "https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip",
                ("val",),
            ),
            RequiredFile(
                "images", ("{split}/",), "test.zip or val.zip of https://vizwiz.cs.colorado.edu/VizWiz_final/images"
            ),
        ),
        read=_read_vizwiz,
        measure=_measure_vizwiz,
        submit=_submit_vizwiz,
        server="https://eval.ai/web/challenges/challenge-page/2185 (it was 1911)",
    ),
    _loader(
        name="textvqa",
        title="TextVQA",
        folder="textvqa",
        needs=(
            playground("questions", *both("textvqa_val_v051_ocr.jsonl")),
            RequiredFile(
                "annotations",
                ("TextVQA_0.5.1_val.json",),
                "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
            ),
            RequiredFile(
                "images", ("train_images/",), "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
            ),
        ),
        read=_read_textvqa,
        measure=_measure_textvqa,
        missing=LEFT_OUT,
    ),
)
