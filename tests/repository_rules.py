"""Repository rules that no linter knows: import levels, one importer per library, ceilings, forbidden text.

Each rule takes a Source and yields (line, violation). tests/test_architecture.py applies them to the repository.
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
    "sentencepiece": ("text/sentencepiece_tokenizer.py", "examples/quickstart/*.py"),
    "tokenizers": ("text/hf_tokenizer.py", "examples/quickstart/*.py"),
    "nvidia.dali": ("data/images/dali_decoder.py",),
    "PIL": (
        "data/*",
        "tools/bench_*.py",
        "examples/quickstart/*.py",
    ),
    "simplejpeg": ("data/images/jpeg_damage.py",),
    "matplotlib": ("observability/charts.py",),
    "openpyxl": ("evaluate/tasks/mmbench.py",),
    "starlette": ("serve/*",),
    "uvicorn": ("serve/*",),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LINE_LENGTH = 400, 60, 120
# Code lines of one folder of the package, and of the whole package.
MAX_FOLDER_CODE, MAX_PACKAGE_CODE = 5_200, 31_000
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


def lines_are_short(source: Source) -> Found:
    # ruff's E501 lets a long line without spaces pass.
    if source.path.endswith((*CODE, ".yaml", ".toml")):
        for number, line in enumerate(source.text.splitlines(), 1):
            if len(line) > MAX_LINE_LENGTH:
                yield number, f"{len(line)} characters, ceiling {MAX_LINE_LENGTH}"


def functions_are_short(source: Source) -> Found:
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name}: {lines} lines, ceiling {MAX_FUNCTION_LINES}"


def text_is_read_without_its_mark(source: Source) -> Found:
    """Files of users and other programs may begin with a byte-order mark, which only `files.read_text` removes."""
    if source.path in ("setup.py", f"{PACKAGE}/files.py", f"{PACKAGE}/serve/page.py"):  # two read files of their own
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "read_text":
            yield node.lineno, "Path.read_text keeps a byte-order mark; use megatron_share4v.files.read_text"


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
EVERY_TEXT: tuple[Rule, ...] = (
    files_are_short,
    lines_are_short,
    names_say_what_things_are,
    nothing_names_a_machine_or_registry,
)
EVERY_PYTHON: tuple[Rule, ...] = (
    imports_only_lower_levels,
    functions_are_short,
    nothing_is_global,
    no_except_swallows,
    files_open_with_a_docstring,
    docstrings_make_sense_alone,
)
NOT_TESTS: tuple[Rule, ...] = (
    third_parties_have_one_importer,
    configuration_stays_free_of_torch,
    text_is_read_without_its_mark,
)


def violations(source: Source, rule: Rule) -> list[str]:
    """Return one message per violation, `file:line: rule: what`; none where the rule does not apply."""
    applies = rule in EVERY_TEXT or (
        source.is_python and (rule in EVERY_PYTHON or not source.path.startswith("tests/"))
    )
    found = dict.fromkeys(rule(source)) if applies else {}
    return [f"{source.path}:{line}: {rule.__name__}: {what}" for line, what in found]


def code_lines(text: str) -> int:
    """Count lines of code. Docstrings and comments are free, so that the ceiling does not discourage them."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)
