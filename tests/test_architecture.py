"""Repository rules that no linter knows: import levels, one importer per library, ceilings, forbidden text.

Each rule takes a Source and yields (line, violation); the message names file, line and rule. The last tests show each rule
a planted violation.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = "megatron_share4v"
LEVELS = (
    ("exit_codes", "upstream_warnings", "files"),
    ("errors", "logging"),
    ("config",),
    ("parallel", "text", "ops", "remote"),
    ("mcore", "data"),
    ("model", "observability"),
    ("checkpoint", "planner"),
    ("resilience",),
    ("train", "infer"),
    ("serve", "evaluate", "caption"),
)
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}
IMPORTERS = {  # library: files that may import it (paths inside the package or from the root); tests may import all
    "megatron.core": ("mcore/*",),
    "transformer_engine": ("mcore/*",),
    "transformers": ("tools/bench_*.py", "evaluate/agreement.py"),  # to compare with it
    "safetensors": ("checkpoint/*",),
    "tensorboard": ("observability/writers.py",),
    "torch.utils.tensorboard": ("observability/writers.py",),
    "wandb": ("observability/wandb_writer.py",),
    "webdataset": ("data/store/shards.py",),
    "sentencepiece": ("text/tokenizer.py", "examples/quickstart/*.py"),
    "nvidia.dali": ("data/images/dali_decoder.py",),
    "PIL": (
        "data/*",
        "tools/bench_*.py",
        "examples/quickstart/*.py",
    ),
    "matplotlib": ("observability/charts.py",),
    "openpyxl": ("evaluate/tasks/mmbench.py",),
    "starlette": ("serve/*",),
    "uvicorn": ("serve/*",),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 540, 75  # until what the formatter made longer is split: 400, 60
# Code lines of one folder of the package, and of the whole package.
MAX_FOLDER_CODE, MAX_PACKAGE_CODE = 4_200, 26_000
NAMELESS = ("utils", "helpers", "common", "misc")
# The bars are removed below, so that this file does not contain the text it searches for.
OUTSIDE = (
    "/wo|rk/",
    "/ro|ot/",
    "..|/shared",
    "py|pi.org",
    "python|hosted.org",
    "download.py|torch.org",
    "py|pi.nvidia.com",
)
ELSEWHERE = re.compile("|".join(rf"(?<!\w){re.escape(name.replace('|', ''))}" for name in OUTSIDE))

RIDDLE = re.compile(r"(Of|As|Those|It|They|These|Theirs|This rank's)\b")
"""First words of a docstring that refer to something outside of it."""

FOLDERS = (PACKAGE, "tools", "examples", "csrc", "tests", "docs", ".ci")
CODE = (".py", ".sh", ".cpp", ".cu", ".cuh", ".h")
TEXT = (*CODE, ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".html", "")

Found = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class Source:
    """A text file of the repository. `path` is relative to its root, with forward slashes."""

    path: str
    text: str = field(repr=False)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    @property
    def unit(self) -> str:
        """The unit that has a level: a folder or module of the package, or a folder beside it."""
        parts = self.path.removesuffix(".py").split("/")
        return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]

    @property
    def in_package(self) -> bool:
        return self.path.startswith(f"{PACKAGE}/")

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield (line, dotted name) of every import; `from a import b` counts as a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def imports_only_lower_levels(source: Source) -> Found:
    own = source.unit
    if source.in_package and own not in LEVEL_OF and own != "__init__":
        yield 1, f"{own} has no level; give it one in LEVELS"
        return
    for line, name in source.imports():
        top, _, rest = name.partition(".")
        if name.startswith("."):
            yield line, "relative import; write the absolute name"
        elif source.in_package and top in ("tools", "examples", "tests"):
            yield line, f"the package imports {top}, which stands above it"
        elif source.in_package and top == PACKAGE and rest:
            unit = rest.split(".")[0]
            if unit in LEVEL_OF and unit != own and LEVEL_OF[unit] >= LEVEL_OF.get(own, -1):
                yield (
                    line,
                    f"{own} (level {LEVEL_OF.get(own, -1)}) imports {unit} (level {LEVEL_OF[unit]}); "
                    "only lower levels may be imported",
                )


def third_parties_have_one_importer(source: Source) -> Found:
    for line, name in source.imports():
        for library, importers in IMPORTERS.items():
            if f"{name}.".startswith(f"{library}.") and not any(
                fnmatch(source.path.removeprefix(f"{PACKAGE}/"), importer) for importer in importers
            ):
                yield line, f"{library} is imported outside {' and '.join(importers)}"


def configuration_stays_free_of_torch(source: Source) -> Found:
    if source.in_package and source.unit in ("exit_codes", "upstream_warnings", "files", "errors", "logging", "config"):
        yield from (
            (line, f"imports {name}; configuration must load at once")
            for line, name in source.imports()
            if name.split(".")[0] == "torch"
        )


def files_are_short(source: Source) -> Found:
    lines = len(source.text.splitlines())
    if source.path.endswith(CODE) and lines > MAX_FILE_LINES:
        yield lines, f"{lines} lines, ceiling {MAX_FILE_LINES}"


def functions_are_short(source: Source) -> Found:
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name}: {lines} lines, ceiling {MAX_FUNCTION_LINES}"


def nothing_is_global(source: Source) -> Found:
    yield from (
        (node.lineno, f"global {', '.join(node.names)}")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Global)
    )


def no_except_swallows(source: Source) -> Found:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "bare except; name the exceptions"
            if all(isinstance(step, (ast.Pass, ast.Continue)) or _is_constant(step) for step in node.body):
                yield node.lineno, "an except that swallows; handle it, say it, or let it through"


def files_open_with_a_docstring(source: Source) -> Found:
    if not ast.get_docstring(source.tree):
        yield 1, "no docstring: what lives here, and what does not"


def docstrings_make_sense_alone(source: Source) -> Found:
    """An editor shows the first line of a docstring on hover, without its surroundings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(source.tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) and RIDDLE.match(text):
            yield (
                getattr(node, "lineno", 1),
                f"docstring begins with {text.split()[0]!r}; begin with what this is or does",
            )


def names_say_what_things_are(source: Source) -> Found:
    # csrc/common holds what all kernels include; its name is the usual one for that.
    for part in Path(source.path.removeprefix("csrc/common/")).parts:
        if Path(part).stem in NAMELESS:
            yield 1, f"a file or folder named {part} says nothing about what is in it"


def nothing_names_a_machine_or_registry(source: Source) -> Found:
    for line, text in enumerate(source.text.splitlines(), 1):
        if match := ELSEWHERE.search(text):
            yield line, f"names {match[0]}, a place outside the repository"


def _is_constant(step: ast.stmt) -> bool:
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)


Rule = Callable[[Source], Found]
EVERY_TEXT: tuple[Rule, ...] = (files_are_short, names_say_what_things_are, nothing_names_a_machine_or_registry)
EVERY_PYTHON: tuple[Rule, ...] = (
    imports_only_lower_levels,
    functions_are_short,
    nothing_is_global,
    no_except_swallows,
    files_open_with_a_docstring,
)
NOT_TESTS: tuple[Rule, ...] = (third_parties_have_one_importer, configuration_stays_free_of_torch)


def violations(source: Source, rule: Rule) -> list[str]:
    """Return one message per violation, `file:line: rule: what`; none where the rule does not apply."""
    applies = rule in EVERY_TEXT or (
        source.is_python and (rule in EVERY_PYTHON or not source.path.startswith("tests/"))
    )
    found = dict.fromkeys(rule(source)) if applies else {}
    return [f"{source.path}:{line}: {rule.__name__}: {what}" for line, what in found]


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


def code_lines(text: str) -> int:
    """Count lines of code. Docstrings and comments are free, so that the ceiling does not discourage them."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


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
        "outside text/tokenizer.py and examples/quickstart/*.py",
    ),
    (configuration_stays_free_of_torch, "config/a.py", "from torch import nn", "imports torch.nn"),
    (files_are_short, "ops/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), f"{MAX_FILE_LINES + 2} lines"),
    (functions_are_short, "ops/a.py", LONG, f"f: {MAX_FUNCTION_LINES + 1} lines"),
    (
        functions_are_short,
        "ops/a.py",
        "class C:\n    async " + LONG.replace("\n", "\n    "),
        f"f: {MAX_FUNCTION_LINES + 1} lines",
    ),
    (nothing_is_global, "ops/a.py", "def f():\n    global state", "global state"),
    (no_except_swallows, "ops/a.py", "try:\n    x = 1\nexcept ValueError:\n    pass", "swallows"),
    (
        no_except_swallows,
        "ops/a.py",
        "for x in y:\n    try:\n        x()\n    except OSError:\n        'why'\n        continue",
        "swallows",
    ),
    (no_except_swallows, "ops/a.py", "try:\n    x = 1\nexcept:\n    raise", "bare except"),
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
