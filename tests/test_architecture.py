"""The repository keeps the rules of repository_rules.py, and each rule finds a planted violation."""

from __future__ import annotations

from pathlib import Path

import pytest
from repository_rules import (
    EVERY_PYTHON,
    EVERY_TEXT,
    FOLDERS,
    MAX_FILE_LINES,
    MAX_FOLDER_CODE,
    MAX_FUNCTION_LINES,
    MAX_LINE_LENGTH,
    MAX_PACKAGE_CODE,
    NOT_TESTS,
    PACKAGE,
    TEXT,
    Rule,
    Source,
    code_lines,
    configuration_stays_free_of_torch,
    docstrings_make_sense_alone,
    files_are_short,
    files_open_with_a_docstring,
    functions_are_short,
    imports_only_lower_levels,
    lines_are_short,
    names_say_what_things_are,
    no_except_swallows,
    nothing_is_global,
    nothing_names_a_machine_or_registry,
    text_is_read_without_its_mark,
    third_parties_have_one_importer,
    violations,
)


@pytest.fixture(scope="module")
def sources(repository: Path) -> list[Source]:
    inside = [path for folder in FOLDERS for path in sorted((repository / folder).rglob("*"))]
    files = [
        path
        for path in (*sorted(repository.glob("*")), *inside)
        if path.is_file() and path.suffix in TEXT and not {"__pycache__", ".git"} & {*path.parts}
    ]
    return [
        Source(path.relative_to(repository).as_posix(), path.read_text(encoding="utf-8", errors="replace"))
        for path in files
    ]


@pytest.mark.parametrize("rule", (*EVERY_TEXT, *EVERY_PYTHON, *NOT_TESTS), ids=lambda rule: rule.__name__)
def test_rule_is_kept(sources: list[Source], rule: Rule) -> None:
    found = [message for source in sources for message in violations(source, rule)]
    assert not found, "\n" + "\n".join(found)


def test_package_stays_small(sources: list[Source]) -> None:
    folders: dict[str, int] = {}
    for source in sources:
        if source.in_package and source.is_python:
            folders[source.path.split("/")[1]] = folders.get(source.path.split("/")[1], 0) + code_lines(source.text)
    assert not (large := {folder: lines for folder, lines in folders.items() if lines > MAX_FOLDER_CODE}), (
        f"ceiling of a folder {MAX_FOLDER_CODE}: {large}"
    )
    assert sum(folders.values()) <= MAX_PACKAGE_CODE, (
        f"{PACKAGE} has {sum(folders.values())} lines of code, ceiling {MAX_PACKAGE_CODE}: {folders}"
    )


def test_only_code_counts() -> None:
    assert code_lines('"""One\n\ntwo."""\n\n# three\nx = (\n    1,  # four\n)\n') == 3


def test_packages_are_packages_and_tests_are_not(sources: list[Source]) -> None:
    paths = {source.path for source in sources if source.is_python}
    folders = {path.rpartition("/")[0] for path in paths if path.startswith(f"{PACKAGE}/")}
    missing = sorted({f"{folder}/__init__.py" for folder in folders} - paths)
    assert not missing, f"without these, setup.py leaves their folders out: {missing}"
    superfluous = [path for path in paths if path.startswith("tests/") and path.endswith("__init__.py")]
    assert not superfluous, f"pytest imports tests by file; remove {superfluous}"


DOCSTRING = '"""What lives here."""\n'
LONG = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
PLANTED = [
    (
        imports_only_lower_levels,
        "text/a.py",
        "from megatron_share4v.model.share4v import Share4V",
        "text (level 3) imports model (level 5)",
    ),
    (
        imports_only_lower_levels,
        "text/a.py",
        "def f():\n    import megatron_share4v.ops.rope",
        "text (level 3) imports ops (level 3)",
    ),
    (
        imports_only_lower_levels,
        "logging.py",
        "from megatron_share4v import errors",
        "logging (level 1) imports errors (level 1)",
    ),
    (
        imports_only_lower_levels,
        "__init__.py",
        "from megatron_share4v.errors import ConfigError",
        "__init__ (level -1) imports errors",
    ),
    (imports_only_lower_levels, "train/a.py", "from tools.train import main", "imports tools"),
    (imports_only_lower_levels, "train/a.py", "from .loop import run", "relative import"),
    (imports_only_lower_levels, "attic/a.py", "", "attic has no level"),
    (
        third_parties_have_one_importer,
        "train/a.py",
        "from megatron import core",
        "megatron.core is imported outside mcore/*",
    ),
    (
        third_parties_have_one_importer,
        "train/a.py",
        "import megatron.core.parallel_state as mpu",
        "megatron.core is imported outside mcore/*",
    ),
    (
        third_parties_have_one_importer,
        "text/tokenizer.py",
        "from transformers import AutoTokenizer",
        "transformers is imported outside tools/bench_*.py",
    ),
    (
        third_parties_have_one_importer,
        "train/a.py",
        "from torch.utils import tensorboard",
        "outside observability/writers.py",
    ),
    (third_parties_have_one_importer, "serve/a.py", "from PIL import Image", "PIL is imported outside data/*"),
    (
        third_parties_have_one_importer,
        "data/a.py",
        "import sentencepiece",
        "outside text/sentencepiece_tokenizer.py and examples/quickstart/*.py",
    ),
    (configuration_stays_free_of_torch, "config/a.py", "from torch import nn", "imports torch.nn"),
    (lines_are_short, "ops/a.py", "x = '" + "y" * MAX_LINE_LENGTH + "'\n", f"{MAX_LINE_LENGTH + 6} characters"),
    (files_are_short, "ops/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), f"{MAX_FILE_LINES + 2} lines"),
    (functions_are_short, "ops/a.py", LONG, f"f: {MAX_FUNCTION_LINES + 1} lines"),
    (
        functions_are_short,
        "ops/a.py",
        "class C:\n    async " + LONG.replace("\n", "\n    "),
        f"f: {MAX_FUNCTION_LINES + 1} lines",
    ),
    (text_is_read_without_its_mark, "ops/a.py", 'x = path.read_text(encoding="utf-8")', "files.read_text"),
    (nothing_is_global, "ops/a.py", "def f():\n    global state", "global state"),
    (no_except_swallows, "ops/a.py", "try:\n    x = 1\nexcept ValueError:\n    pass", "swallows"),
    (
        no_except_swallows,
        "ops/a.py",
        "for x in y:\n    try:\n        x()\n    except OSError:\n        'why'\n        continue",
        "swallows",
    ),
    (no_except_swallows, "ops/a.py", "try:\n    x = 1\nexcept:\n    raise", "bare except"),
    (docstrings_make_sense_alone, "ops/a.py", 'def f():\n    """Those of all ranks."""', "begins with 'Those'"),
    (names_say_what_things_are, "train/utils.py", "", "utils.py says nothing"),
    (names_say_what_things_are, "common/a.py", "", "common says nothing"),
    (nothing_names_a_machine_or_registry, "ops/a.py", "x = '/" + "root/x'", "a place outside"),
    (nothing_names_a_machine_or_registry, "ops/a.py", "# https://" + "pypi" + ".org/simple", "a place outside"),
    (nothing_names_a_machine_or_registry, "ops/a.py", "# see ." + "./shared/spec", "a place outside"),
]


@pytest.mark.parametrize(("rule", "path", "code", "what"), PLANTED)
def test_planted_violation_is_found(rule: Rule, path: str, code: str, what: str) -> None:
    found = violations(Source(f"{PACKAGE}/{path}", DOCSTRING + code), rule)
    assert len(found) == 1
    assert found[0].startswith(f"{PACKAGE}/{path}:") and f": {rule.__name__}: " in found[0] and what in found[0]


def test_missing_docstring_is_found() -> None:
    assert violations(Source(f"{PACKAGE}/ops/a.py", "import os\n"), files_open_with_a_docstring)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"{PACKAGE}/mcore/a.py", "import megatron.core"),
        (
            f"{PACKAGE}/model/a.py",
            "from megatron_share4v import __version__\nfrom megatron_share4v.model.loss import f",
        ),
        (f"{PACKAGE}/model/a.py", "from megatron_share4v.mcore import f"),
        (f"{PACKAGE}/model/a.py", "import transformers_of_ours"),
        (f"{PACKAGE}/model/a.py", "try:\n    x = 1\nexcept ValueError as error:\n    raise OSError from error"),
        (f"{PACKAGE}/model/a.py", "x = 'network/roots/a'"),
        ("tests/a.py", "import transformers, megatron.core, PIL.Image\nfrom megatron_share4v.serve import server"),
        ("tools/a.py", "from megatron_share4v.serve import server"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, code: str) -> None:
    source = Source(path, DOCSTRING + code)
    assert [message for rule in (*EVERY_TEXT, *EVERY_PYTHON, *NOT_TESTS) for message in violations(source, rule)] == []
