"""Small benchmarks in their official file formats, for tests: about six questions each, with tiny pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

from benchmark_writers import LETTER, SHORT, encode_picture, question_row, write_json, write_jsonl, write_pictures
from official_short_answer_files import custom, gqa, textvqa, vizwiz, vizwiz_val, vqav2, vqav2_val

SCIENCE = (  # id, question with options in CQM-A format, number of options, index of the answer, has an image
    ("21192", "Which continent is highlighted?\nA. Africa\nB. South America\nC. North America\nD. Asia", 4, 1, True),
    (
        "21195",
        "Which word would you find on a dictionary page with the following guide words?\n"
        "pad - poison\nA. president\nB. peach",
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
        "Context: A bulldozer clears a path.\nWhat is the direction of this push?\n"
        "A. away from the bulldozer\nB. toward the bulldozer",
        2,
        0,
        True,
    ),
    (
        "21206",
        "Which is a complete sentence?\n"
        "A. Amy is from Greenwood now she lives in Wildgrove.\nB. This book explains it.",
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
    write_json(root / "llava_test_CQM-A.json", rows)
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", {"train": [], "test": list(problems)})
    write_pictures(root / "images/test", [row["image"] for row in rows if "image" in row])


MME = (  # subtask, image, question in the text file, question in the question file, ground truth
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
    write_jsonl(
        root / "llava_mme.jsonl",
        [question_row(f"{task}/{name}", f"{task}/{name}", prompt + SHORT, task) for task, name, _, prompt, _ in MME],
    )
    images = root / "MME_Benchmark_release_version"
    write_pictures(images, {f"{task}/{name}" for task, name, *_ in MME})
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
            question_row(start + k + 1, f"COCO_val2014_{k:012}.jpg", f"Is there a {thing} in the image?{SHORT}", split)
            for k, thing in enumerate(things)
        ]
        labels = ["yes", "no", "yes", "no"]
        write_jsonl(
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
    write_jsonl(root / "llava_pope_test.jsonl", rows)
    write_pictures(root / "val2014", {row["image"] for row in rows})


def seed(root: Path) -> None:
    rows, questions = [], []
    for k in range(6):
        text = f"How many towels are in image {k}?"
        options = ["One", "Two", "Three", "Four"]
        name, kind = (101669 + k, "image") if k < 5 else ("v0", "video")
        image = f"SEED-Bench-image/{k}_{k}" if k < 5 else "SEED-Bench-video-image/0.png"
        body = text + "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options))
        rows.append(question_row(name, image, body + LETTER, "default"))
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
    write_jsonl(root / "llava-seed-bench.jsonl", rows)
    write_json(
        root / "SEED-Bench.json",
        {"questions": questions, "question_type": {"Scene Understanding": 1, "Instance Identity": 2}},
    )
    write_pictures(root, [row["image"] for row in rows[:5]])


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
    write_json(root / f"llvisionqa_{split}.json", rows)
    write_pictures(root / "images_llvisionqa", [row["img_path"] for row in rows])


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
        image = base64.b64encode(encode_picture(k)).decode()
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
    write_jsonl(
        root / "questions.jsonl",
        [question_row(k, image, text, category) for k, (image, category, text) in enumerate(WILD)],
    )
    write_jsonl(
        root / "context.jsonl", [{"id": f"{k}", "image": f"00{k}.jpg", "caption": f"Picture {k}."} for k in (1, 2)]
    )
    with (root / "context.jsonl").open("a") as file:
        file.write(json.dumps({"id": "3", "image": "003.jpg", "caption": ["One sentence.", "Another."]}) + "\n")
    write_jsonl(
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
    write_pictures(root / "images", {image for image, *_ in WILD})


VET = (
    ("What is x in the equation?", "-1<AND>-5", ["ocr", "math"]),
    ("What is d?", "1.25<OR>5/4", ["ocr", "math"]),
    ("Which car is on the parking spot 33?", "no", ["rec"]),
    ("Is this apple organic?", "yes", ["rec", "ocr"]),
    ("What will the girl do?", "She will cut the cake.", ["gen", "rec"]),
)


def mm_vet(root: Path) -> None:
    write_jsonl(
        root / "llava-mm-vet.jsonl",
        [question_row(k, f"v1_{k}.png", text, "conv") for k, (text, _, _) in enumerate(VET)],
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
    write_json(root / "mm-vet.json", truth)
    write_pictures(root / "images", [f"v1_{k}.png" for k in range(len(VET))])


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
"""Functions that write a benchmark to a folder, by benchmark name and split."""
