"""docs/evaluation.md lists the benchmarks, splits and files of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_share4v.evaluate.metrics.profile import OFFICIAL
from megatron_share4v.evaluate.task import Task
from megatron_share4v.evaluate.tasks import TASKS

ALTERNATIVE_NAMES = {
    "v2_OpenEnded_mscoco_test2015_questions.json",
    "resources/mm-vet.json",
    "testdev_balanced_questions.json",
}
"""Accepted file names that the document omits."""


@pytest.fixture(scope="module")
def document(repository: Path) -> str:
    return (repository / "docs/evaluation.md").read_text(encoding="utf-8")


def row_of(document: str, name: str, split: str) -> str:
    is_default = split == TASKS[name].splits[0]
    heads = (f"| `{name}` |",) if is_default else (f"| `{name} --split {split}` |", f"| `{name}` |")
    return next(line for head in heads for line in document.splitlines() if line.startswith(head))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_file_is_in_the_table(document: str, task: Task) -> None:
    for split in task.splits:
        if split.startswith("test_"):
            continue  # files of MMBench test splits follow the names of dev
        row = row_of(document, task.name, split)
        assert task.folder in row
        for need in task.needs:
            if (need.splits and split not in need.splits) or need.names == ("./",):
                continue
            names = [name.replace("{split}", split) for name in need.names]
            shortened = [re.sub(r"^(share4v|llava)(?=[_-])", "*", name) for name in names]
            braces = [
                re.sub(r"pope_(random|popular|adversarial)\.", "pope_{random,popular,adversarial}.", name)
                for name in names
            ]
            assert any(f"`{name}" in row for name in (*names, *shortened, *braces) if name not in ALTERNATIVE_NAMES), (
                need.key,
                row,
            )


def test_runner_table_matches_decoding_settings(document: str) -> None:
    part = document[document.index("Four official runners") : document.index("### The two profiles")]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")
    ][1:]
    named = {}
    for names, image, tokens, system in rows:
        for name in names.split(", "):
            named[name] = ("crop" if "crop" in image else "pad", int(tokens), "human" if "human" in system else "user")
    assert named == {
        name: (d.image_mode, d.max_new_tokens, d.system)
        for name, task in TASKS.items()
        for d in [task.decoding(OFFICIAL)]
    }


def test_every_headline_is_explained(document: str) -> None:
    part = document[document.index("## What the numbers mean") :]
    assert all(f"`{task.headline}`" in part for task in TASKS.values() if task.headline)
    assert all(judge in document for judge in ("gpt-4-0314", "gpt-4-0613"))
