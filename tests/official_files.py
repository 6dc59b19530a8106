"""Small benchmarks in the formats of the official files, written to a folder: six questions or so each, with tiny pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (40 * number % 256, 90, 10)).save(buffer, format=kind)
    return buffer.getvalue()


def pictures(root: Path, names: Iterable[str]) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _question(number: int | str, image: str, text: str, category: str = "default") -> dict:
    return {"question_id": number, "image": image, "text": text, "category": category}


VQA = (
    "What color is the car?",
    "Is it raining?",
    "How many dogs?",
    "What is he holding?",
    "Where is this?",
    "What's on the sign?",
)


def vqav2(root: Path) -> None:
    rows = [_question(1000 + k, f"COCO_test2015_{k:012}.jpg", text + SHORT) for k, text in enumerate(VQA)]
    pictures(root / "test2015", [row["image"] for row in rows])
    jsonl(root / "share4v_vqav2_mscoco_test-dev2015.jsonl", rows)
    jsonl(
        root / "llava_vqav2_mscoco_test2015.jsonl",
        [_question(999, "COCO_test2015_000000000999.jpg", "Not asked?" + SHORT), *rows],
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
            "multiple_choice_answer": said[0],
            "answers": [{"answer": one, "answer_confidence": "yes", "answer_id": i + 1} for i, one in enumerate(said)],
        }
        for k, (name, said) in enumerate(zip(names, people))
    ]
    as_json(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    as_json(root / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})
    pictures(root / "val2014", [f"COCO_val2014_{262148 + k:012}.jpg" for k in range(len(VQA))])


GQA = (
    ("201307251", "Is it overcast?", "no", "verify"),
    ("201640614", "Who is wearing the dress?", "women", "query"),
    ("202225914", "Is the chair to the left or to the right of the boy?", "right", "choose"),
    ("20341097", "Where is that fire hydrant?", "sidewalk", "query"),
    ("20602949", "Are both the phone and the coffee cup the same color?", "yes", "compare"),
    ("201738903", "Who is staring?", "man", "query"),
)


def gqa(root: Path) -> None:
    jsonl(
        root / "llava_gqa_testdev_balanced.jsonl",
        [_question(name, f"n{name}.jpg", text + SHORT) for name, text, _, _ in GQA],
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
    as_json(root / "data/testdev_balanced_questions.json", truth)
    pictures(root / "data/images", [f"n{name}.jpg" for name, *_ in GQA])


VIZWIZ = ("What is this?", "This is a box.", "What's in this picture", "What flavor is it", "Can you read this?")


def vizwiz(root: Path) -> None:
    rows = [_question(k, f"VizWiz_test_{k:08}.jpg", text + UNANSWERABLE + SHORT) for k, text in enumerate(VIZWIZ)]
    jsonl(root / "llava_test.jsonl", rows)
    pictures(root / "test", [row["image"] for row in rows])


def vizwiz_val(root: Path) -> None:
    names = [f"VizWiz_val_{k:08}.jpg" for k in range(len(VIZWIZ))]
    answers = [["soda"] * 10, ["unanswerable"] * 10, ["dog"] * 2 + ["cat"] * 8, ["Vanilla."] * 10, ["no"] * 10]
    as_json(
        root / "val.json",
        [
            {
                "image": name,
                "question": text,
                "answers": [{"answer_confidence": "yes", "answer": a} for a in said],
                "answer_type": "other",
                "answerable": 1,
            }
            for name, text, said in zip(names, VIZWIZ, answers)
        ],
    )
    pictures(root / "val", names)


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
    rows = [_question(name, f"{name}.jpg", text + tokens + SHORT) for name, text, tokens, _ in TEXTVQA]
    jsonl(root / "llava_textvqa_val_v051_ocr.jsonl", rows)
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
    as_json(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": data})
    pictures(root / "train_images", {row["image"] for row in rows})


SCIENCE = (  # id, question with options as CQM-A writes them, number of options, right one, with an image?
    ("21192", "Which continent is highlighted?\nA. Africa\nB. South America\nC. North America\nD. Asia", 4, 1, True),
    (
        "21195",
        "Which word would you find on a dictionary page with the following guide words?\npad - poison\nA. president\nB. peach",
        2,
        1,
        False,
    ),
    (
        "21196",
        "Which of these states is farthest west?\nA. Alabama\nB. Illinois\nC. South Carolina\nD. Connecticut",
        4,
        1,
        True,
    ),
    (
        "21200",
        "Context: A bulldozer clears a path.\nWhat is the direction of this push?\nA. away from the bulldozer\nB. toward the bulldozer",
        2,
        0,
        True,
    ),
    (
        "21206",
        "Which is a complete sentence?\nA. Amy is from Greenwood now she lives in Wildgrove.\nB. This book explains it.",
        2,
        1,
        False,
    ),
)


def science_qa(root: Path) -> None:
    rows, problems = [], {}
    for name, text, choices, answer, has_image in SCIENCE:
        turns = [
            {"from": "human", "value": f"<image>\n{text}" if has_image else text},
            {"from": "gpt", "value": "ABCDE"[answer]},
        ]
        rows.append({"id": name} | ({"image": f"{name}/image.png"} if has_image else {}) | {"conversations": turns})
        problems[name] = {
            "question": "q",
            "choices": ["c"] * choices,
            "answer": answer,
            "image": "image.png" if has_image else None,
            "split": "test",
        }
    as_json(root / "llava_test_CQM-A.json", rows)
    as_json(root / "problems.json", problems)
    as_json(root / "pid_splits.json", {"train": [], "test": list(problems)})
    pictures(root / "images/test", [row["image"] for row in rows if "image" in row])


MME = (  # question as the text file has it, as the question file has it, truth
    (
        "existence",
        "000000006040.jpg",
        "Is there a train in this image? Please answer yes or no.",
        "Is there a train in this image?",
        "Yes",
    ),
    (
        "existence",
        "000000006040.jpg",
        "Is there a laptop in this image? Please answer yes or no.",
        "Is there a laptop in this image?",
        "No",
    ),
    (
        "posters",
        "images/tt0116209.jpg",
        "Is this movie titled moonstruck (1987)? Please answer yes or no.",
        "Is this movie titled moonstruck (1987)?",
        "Yes",
    ),
    (
        "posters",
        "images/tt0116209.jpg",
        "Is this movie directed by jing wong?  Please answer yes or no.",
        "Is this movie directed by jing wong?",
        "No",
    ),
    (
        "code_reasoning",
        "0001.png",
        'Will it print "Hi"? Please answer yes or no.',
        'Will it print "Hi"? Please answer yes or no.',
        "Yes",
    ),
    (
        "code_reasoning",
        "0001.png",
        'Will it print "Ho"? Please answer yes or no.',
        'Will it print "Ho"? Please answer yes or no.',
        "No",
    ),
)


def mme(root: Path) -> None:
    jsonl(
        root / "llava_mme.jsonl",
        [_question(f"{task}/{name}", f"{task}/{name}", asked + SHORT, task) for task, name, _, asked, _ in MME],
    )
    images = root / "MME_Benchmark_release_version"
    pictures(images, {f"{task}/{name}" for task, name, *_ in MME})
    for task, name, text, _, truth in MME:
        folder = images / task / ("questions_answers_YN" if "/" in name else "")
        folder.mkdir(exist_ok=True)
        with (folder / f"{Path(name).stem}.txt").open("a") as file:
            file.write(f"{text}\t{truth}\n")


def pope(root: Path) -> None:
    rows = []
    for start, split in ((0, "adversarial"), (10_000_000, "random"), (20_000_000, "popular")):
        things = ["snowboard", "car", "person", "chair"]
        rows += [
            _question(start + k + 1, f"COCO_val2014_{k:012}.jpg", f"Is there a {thing} in the image?{SHORT}", split)
            for k, thing in enumerate(things)
        ]
        labels = ["yes", "no", "yes", "no"]
        jsonl(
            root / f"coco/coco_pope_{split}.json",
            [
                {
                    "question_id": k + 1,
                    "image": f"COCO_val2014_{k:012}.jpg",
                    "text": f"Is there a {thing} in the image?",
                    "label": label,
                }
                for k, (thing, label) in enumerate(zip(things, labels))
            ],
        )
    jsonl(root / "llava_pope_test.jsonl", rows)
    pictures(root / "val2014", {row["image"] for row in rows})


def seed(root: Path) -> None:
    rows, questions = [], []
    for k in range(6):
        text = f"How many towels are in image {k}?"
        options = ["One", "Two", "Three", "Four"]
        name, kind = (101669 + k, "image") if k < 5 else ("v0", "video")
        image = f"SEED-Bench-image/{k}_{k}" if k < 5 else "SEED-Bench-video-image/0.png"
        body = text + "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options))
        rows.append(_question(name, image, body + LETTER, "default"))
        questions.append(
            {f"choice_{letter}": option for letter, option in zip("abcd", options)}
            | {
                "answer": "ABCDA"[k % 5],
                "data_id": image,
                "data_type": kind,
                "question": text,
                "question_id": str(name),
                "question_type_id": 1 + k % 2,
            }
        )
    jsonl(root / "llava-seed-bench.jsonl", rows)
    as_json(
        root / "SEED-Bench.json",
        {"questions": questions, "question_type": {"Scene Understanding": 1, "Instance Identity": 2}},
    )
    pictures(root, [row["image"] for row in rows[:5]])


QBENCH = (
    ("How is the clarity?", ["Clear", "Blurry", "Fair"], "Blurry"),
    ("Is it bright?", ["Yes", "No"], "Yes"),
    ("Which part is noisy?", ["Sky", "Tree", "Road", "Man"], "Man"),
    ("Is there motion blur?", ["No", "Yes"], "No"),
    ("How is the colour?", ["Rich", "Dull"], "Dull"),
)


def qbench(root: Path, split: str = "dev") -> None:
    rows = [
        {"img_path": f"{k:05}.jpg", "question": text, "candidates": candidates, "type": 0, "concern": 1}
        | ({"correct_ans": right} if split == "dev" else {})
        for k, (text, candidates, right) in enumerate(QBENCH)
    ]
    as_json(root / f"llvisionqa_{split}.json", rows)
    pictures(root / "images_llvisionqa", [row["img_path"] for row in rows])


COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
)
IDENTIFY = "Identify the question that can be answered."
MMBENCH = (
    (
        "241",
        IDENTIFY,
        "Magnets pull.\nOr push.",
        "Is it iron?",
        'Does "it" float?',
        "",
        "",
        "B",
        "physics",
        "logic_reasoning",
    ),
    ("252", "Which is right?", "", "Left", "None", "Right", "", "A", "attribute", "attribute_reasoning"),
    ("300", "Where is the cat?", "nan", "On the mat", "Under it", "N/A", "Above", "A", "spatial", "relation_reasoning"),
    (
        "1000241",
        IDENTIFY,
        "Magnets pull.\nOr push.",
        'Does "it" float?',
        "Is it iron?",
        "",
        "",
        "A",
        "physics",
        "logic_reasoning",
    ),
    ("301", "How many?", "", "1", "2", "3", "4", "D", "count", "finegrained_perception (instance-level)"),
    ("1000301", "How many?", "", "2", "3", "4", "1", "C", "count", "finegrained_perception (instance-level)"),
)


def mmbench(root: Path, split: str = "dev_20230712") -> None:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '"\t\n') else text

    lines = ["\t".join(COLUMNS)]
    for k, (index, question, hint, a, b, c, d, answer, category, l2) in enumerate(MMBENCH):
        image = base64.b64encode(picture(k)).decode()
        cells = (index, question, hint, a, b, c, d, answer, category, image, "made here", l2, "", "dev")
        lines.append("\t".join(map(cell, cells)))
    (root / f"mmbench_{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def mmbench_cn(root: Path) -> None:
    mmbench(root, "dev_cn_20231003")


WILD = (
    ("001.jpg", "conv", "What is the name of this famous sight?"),
    ("001.jpg", "detail", "Describe this photo in detail."),
    ("002.jpg", "complex", "Why?"),
    ("002.jpg", "conv", "What is shown?"),
    ("003.jpg", "detail", "Tell all."),
)


def llava_bench(root: Path) -> None:
    jsonl(
        root / "questions.jsonl",
        [_question(k, image, text, category) for k, (image, category, text) in enumerate(WILD)],
    )
    jsonl(root / "context.jsonl", [{"id": f"{k}", "image": f"00{k}.jpg", "caption": f"Picture {k}."} for k in (1, 2)])
    with (root / "context.jsonl").open("a") as file:
        file.write(json.dumps({"id": "3", "image": "003.jpg", "caption": ["One sentence.", "Another."]}) + "\n")
    jsonl(
        root / "answers_gpt4.jsonl",
        [
            {
                "question_id": k,
                "prompt": text,
                "answer_id": f"ref{k}",
                "model_id": "gpt4",
                "metadata": {},
                "text": f"Reference {k}.",
            }
            for k, (_, _, text) in enumerate(WILD)
        ],
    )
    pictures(root / "images", {image for image, *_ in WILD})


VET = (
    ("What is x in the equation?", "-1<AND>-5", ["ocr", "math"]),
    ("What is d?", "1.25<OR>5/4", ["ocr", "math"]),
    ("Which car is on the parking spot 33?", "no", ["rec"]),
    ("Is this apple organic?", "yes", ["rec", "ocr"]),
    ("What will the girl do?", "She will cut the cake.", ["gen", "rec"]),
)


def mm_vet(root: Path) -> None:
    jsonl(
        root / "llava-mm-vet.jsonl", [_question(k, f"v1_{k}.png", text, "conv") for k, (text, _, _) in enumerate(VET)]
    )
    truth = {
        f"v1_{k}": {
            "imagename": f"v1_{k}.png",
            "question": text,
            "answer": answer,
            "imagesource": "made here",
            "capability": capability,
        }
        for k, (text, answer, capability) in enumerate(VET)
    }
    as_json(root / "mm-vet.json", truth)
    pictures(root / "images", [f"v1_{k}.png" for k in range(len(VET))])


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
    jsonl(root / "questions.jsonl", [*rows, {"question_id": "text", "text": "Who are you?"}])
    pictures(root / "images", ["0.png", "1.png"])
    pictures(root, ["2.png", "3.png"])


WRITERS: dict[tuple[str, str | None], Callable[[Path], None]] = {
    ("vqav2", None): vqav2,
    ("vqav2", "val2014"): vqav2_val,
    ("gqa", None): gqa,
    ("vizwiz", None): vizwiz,
    ("vizwiz", "val"): vizwiz_val,
    ("textvqa", None): textvqa,
    ("science_qa", None): science_qa,
    ("mme", None): mme,
    ("pope", None): pope,
    ("seed", None): seed,
    ("qbench", None): qbench,
    ("qbench", "test"): lambda root: qbench(root, "test"),
    ("mmbench", None): mmbench,
    ("mmbench_cn", None): mmbench_cn,
    ("llava_bench", None): llava_bench,
    ("mm_vet", None): mm_vet,
    ("custom", None): custom,
}
"""By benchmark and split."""
