"""Small VQA-v2, GQA, VizWiz, TextVQA and custom data sets in their official formats, for tests."""

from __future__ import annotations

from pathlib import Path

from benchmark_writers import SHORT, UNANSWERABLE, question_row, write_json, write_jsonl, write_pictures

VQA = (
    "What color is the car?",
    "Is it raining?",
    "How many dogs?",
    "What is he holding?",
    "Where is this?",
    "What's on the sign?",
)


def vqav2(root: Path) -> None:
    rows = [question_row(1000 + k, f"COCO_test2015_{k:012}.jpg", text + SHORT) for k, text in enumerate(VQA)]
    write_pictures(root / "test2015", [row["image"] for row in rows])
    write_jsonl(root / "share4v_vqav2_mscoco_test-dev2015.jsonl", rows)
    write_jsonl(
        root / "llava_vqav2_mscoco_test2015.jsonl",
        [question_row(999, "COCO_test2015_000000000999.jpg", "Not asked?" + SHORT), *rows],
    )


def vqav2_val(root: Path) -> None:
    names = [262148000 + k for k in range(len(VQA))]
    questions = [
        {"image_id": 262148 + k, "question": text, "question_id": name}
        for k, (name, text) in enumerate(zip(names, VQA))
    ]
    people = [
        ["red"] * 10,
        ["yes"] * 9 + ["no"],
        ["2"] * 5 + ["two"] * 5,
        ["umbrella"] * 3 + ["an umbrella"] * 7,
        ["park"] * 10,
        ["Stop"] * 10,
    ]
    annotations = [
        {
            "question_id": name,
            "image_id": 262148 + k,
            "question_type": "what",
            "answer_type": ("other", "yes/no", "number")[k % 3],
            "multiple_choice_answer": given[0],
            "answers": [{"answer": one, "answer_confidence": "yes", "answer_id": i + 1} for i, one in enumerate(given)],
        }
        for k, (name, given) in enumerate(zip(names, people))
    ]
    write_json(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    write_json(root / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})
    write_pictures(root / "val2014", [f"COCO_val2014_{262148 + k:012}.jpg" for k in range(len(VQA))])


GQA = (
    ("201307251", "Is it overcast?", "no", "verify"),
    ("201640614", "Who is wearing the dress?", "women", "query"),
    ("202225914", "Is the chair to the left or to the right of the boy?", "right", "choose"),
    ("20341097", "Where is that fire hydrant?", "sidewalk", "query"),
    ("20602949", "Are both the phone and the coffee cup the same color?", "yes", "compare"),
    ("201738903", "Who is staring?", "man", "query"),
)


def gqa(root: Path) -> None:
    write_jsonl(
        root / "llava_gqa_testdev_balanced.jsonl",
        [question_row(name, f"n{name}.jpg", text + SHORT) for name, text, _, _ in GQA],
    )
    truth = {
        name: {
            "imageId": f"n{name}",
            "question": text,
            "answer": answer,
            "isBalanced": True,
            "fullAnswer": answer,
            "groups": {"global": None},
            "types": {"structural": kind, "semantic": "attr", "detailed": "x"},
        }
        for name, text, answer, kind in GQA
    }
    write_json(root / "data/testdev_balanced_questions.json", truth)
    write_pictures(root / "data/images", [f"n{name}.jpg" for name, *_ in GQA])


VIZWIZ = ("What is this?", "This is a box.", "What's in this picture", "What flavor is it", "Can you read this?")


def vizwiz(root: Path) -> None:
    rows = [question_row(k, f"VizWiz_test_{k:08}.jpg", text + UNANSWERABLE + SHORT) for k, text in enumerate(VIZWIZ)]
    write_jsonl(root / "llava_test.jsonl", rows)
    write_pictures(root / "test", [row["image"] for row in rows])


def vizwiz_val(root: Path) -> None:
    names = [f"VizWiz_val_{k:08}.jpg" for k in range(len(VIZWIZ))]
    answers = [["soda"] * 10, ["unanswerable"] * 10, ["dog"] * 2 + ["cat"] * 8, ["Vanilla."] * 10, ["no"] * 10]
    write_json(
        root / "val.json",
        [
            {
                "image": name,
                "question": text,
                "answers": [{"answer_confidence": "yes", "answer": a} for a in given],
                "answer_type": "other",
                "answerable": 1,
            }
            for name, text, given in zip(names, VIZWIZ, answers)
        ],
    )
    write_pictures(root / "val", names)


TEXTVQA = (
    ("003a8ae2ef43b901", "what is the brand of this camera?", "\nReference OCR token: Dakota, DIGITAL", "dakota"),
    (
        "8cfd3916eac85404",
        "What brand is on the red and black jerseys?",
        "\nReference OCR token: R, Reebo, Ex",
        "reebok",
    ),
    (
        "8cfd3916eac85404",
        "What is the highest number on the players shorts?",
        "\nReference OCR token: R, Reebo, Ex",
        "22",
    ),
    ("ff9b80a751bc3ecc", "When is this being aired?", "\nReference OCR token: S, $, 9-1", "9-1"),
    ("2e45acd379e82164", "What is in the box?", "", "moo"),
)


def textvqa(root: Path) -> None:
    rows = [question_row(name, f"{name}.jpg", text + tokens + SHORT) for name, text, tokens, _ in TEXTVQA]
    write_jsonl(root / "llava_textvqa_val_v051_ocr.jsonl", rows)
    data = [
        {
            "question": text,
            "image_id": name,
            "image_classes": [],
            "question_id": 34602 + k,
            "answers": [answer] * 10,
            "set_name": "val",
        }
        for k, (name, text, _, answer) in enumerate(TEXTVQA)
    ]
    write_json(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": data})
    write_pictures(root / "train_images", {row["image"] for row in rows})


def custom(root: Path) -> None:
    rows = [
        {
            "question_id": k,
            "image": f"{k}.png",
            "text": f"What is it, {k}?",
            "answer": ["a dog", "puppy"] if k else "Two",
        }
        for k in range(4)
    ]
    write_jsonl(root / "questions.jsonl", [*rows, {"question_id": "text", "text": "Who are you?"}])
    write_pictures(root / "images", ["0.png", "1.png"])
    write_pictures(root, ["2.png", "3.png"])
