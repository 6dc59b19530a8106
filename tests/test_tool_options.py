"""Every option of every tool, with a valid value: the parser takes it, and so does what reads the parsed values."""

from __future__ import annotations

import argparse
import contextlib
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_tools import run_tool

from megatron_share4v.config.arguments import above_zero, at_least_zero, natural, positive, share, share_or_zero

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if "argparse" in path.read_text(encoding="utf-8"))
OPENS_INPUT_LAST = ("caption.py", "convert.py", "doctor.py", "evaluate.py", "plan.py", "prepare_data.py", "serve.py")
"""Tools that name a missing input and end with exit code 2 after they have accepted all options."""
APART: dict[str, list[tuple[str, ...]]] = {
    "caption.py": [("--images-file", "--endpoint", "--endpoint-model", "--concurrency", "--retries", "--timeout")],
    "doctor.py data": [("--annotations", "--images", "--tokenizer")],
    "serve.py": [("--api-key-file",)],
    "evaluate.py": [("--answers",), ("--endpoint", "--endpoint-model")],
}
"""Options that exclude others or the positional arguments, and are therefore given in a command of their own."""
MISSING = "no_such_place"
VALUES: dict[object, str] = {
    None: MISSING,
    str: MISSING,
    int: "4",
    float: "0.5",
    positive: "4",
    natural: "4",
    above_zero: "0.5",
    at_least_zero: "0.5",
    share: "0.5",
    share_or_zero: "0.5",
}
"""A valid value by the option's type. Text may name an input, so it names one that is missing, as paths do."""
CONFIG_VALUES = {"N": "20", "X": "0.5", "TEXT": MISSING, "NAME": MISSING, "true|false": "false"}
"""A valid value of an option made from a configuration field, by what the help calls it."""
OWN_VALUES = {
    "--benchmark": "vizwiz",
    "--endpoint": "http://127.0.0.1:9/v1",
    "--host": "127.0.0.1",
    "--max-requests": "2",
    "--num_gpus": "1",
    "--port": "0",
    "--split": "test",
    "--template": "vicuna_v1",
}
"""A valid value of an option whose type does not tell it."""
OUTPUTS = ("--out", "--output")


class _CapturedError(Exception):
    """Raised in place of parsing."""


@dataclass(frozen=True)
class Command:
    """A tool, or one of its subcommands. whole: parser of the whole tool. missing: a path where there is nothing."""

    tool: str
    name: str
    parser: argparse.ArgumentParser
    whole: argparse.ArgumentParser
    missing: Path

    @property
    def options(self) -> list[argparse.Action]:
        """Options of this command, but for --help."""
        return [a for a in self.parser._actions if a.option_strings and not isinstance(a, argparse._HelpAction)]

    def arguments(self, chosen: Sequence[argparse.Action], *, with_positionals: bool = True) -> list[str]:
        """Command line with the chosen options and the required ones."""
        words = [self.name] if self.name else []
        if with_positionals:
            words += [
                str(self.missing)
                for action in self.parser._actions
                if not action.option_strings and action.nargs not in ("*", argparse.REMAINDER)
            ]
        for action in self.options:
            if action in chosen or action.required:
                words += [action.option_strings[-1], *self.values_of(action)]
        return words

    def values_of(self, action: argparse.Action) -> list[str]:
        """A valid value of an option: one word, none for a flag, several where it takes a fixed number."""
        if action.nargs == 0:
            return []
        own = next((OWN_VALUES[name] for name in action.option_strings if name in OWN_VALUES), None)
        if own is None and action.choices:
            own = str(next(iter(action.choices)))
        if own is None and action.type is Path:
            is_output = any(name in OUTPUTS for name in action.option_strings)
            own = str(self.missing.with_name("output") if is_output else self.missing)
        if own is None:
            own = VALUES.get(action.type, CONFIG_VALUES.get(str(action.metavar)))
        assert own is not None, f"{self.tool}: no valid value of {action.option_strings} is known"
        return [own] * (action.nargs if isinstance(action.nargs, int) else 1)


def capture_parser(tool: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Run a tool up to where it parses its command line, and return the parser."""
    found: list[argparse.ArgumentParser] = []

    def capture(parser: argparse.ArgumentParser, *_: object) -> Any:
        found.append(parser)
        raise _CapturedError

    with monkeypatch.context() as patch, contextlib.suppress(_CapturedError):
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, capture)
        patch.setattr(sys, "argv", [tool])
        patch.syspath_prepend(str(ROOT / "tools"))
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    assert found, f"tools/{tool} does not parse its command line with argparse"
    return found[0]


def make_directory(path: Path) -> None:
    """Make a directory that has a file, but is no checkpoint."""
    path.mkdir()
    (path / "notes.txt").touch()


def commands_of(tool: str, missing: Path, monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """The tool's subcommands, or the tool itself."""
    parser = capture_parser(tool, monkeypatch)
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        return [Command(tool, "", parser, parser, missing)]
    return [Command(tool, name, own, parser, missing) for name, own in nested[0].choices.items()]


@pytest.mark.parametrize("tool", TOOLS)
def test_each_option_is_parsed(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_directory(tmp_path / MISSING)
    for command in commands_of(tool, tmp_path / MISSING, monkeypatch):
        for option in command.options:
            parsed = vars(command.whole.parse_args(command.arguments([option])))
            words = command.values_of(option)
            given = parsed[option.dest]
            shown = [str(one).lower() for one in (given if isinstance(given, list) else [given])]
            assert shown == words or (not words and given != option.default), (tool, option.option_strings, given)


@pytest.mark.parametrize("tool", OPENS_INPUT_LAST)
def test_options_are_accepted(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_server = tool == "serve.py"
    if tool in ("evaluate.py", "serve.py"):
        make_directory(tmp_path / MISSING)  # their parsers already refuse a checkpoint that is no directory
    for command in commands_of(tool, tmp_path / MISSING, monkeypatch):
        groups = APART.get(f"{tool} {command.name}".strip(), [])
        apart = {name for group in groups for name in group}
        lines = [command.arguments([o for o in command.options if not apart.intersection(o.option_strings)])]
        for group in groups:
            chosen = [option for option in command.options if set(group).intersection(option.option_strings)]
            lines.append(command.arguments(chosen, with_positionals=is_server))
        for line in lines:
            done = run_tool(f"tools/{tool}", *line)
            assert done.returncode == 2 and MISSING in done.stderr, (line, done.stderr)


@pytest.mark.parametrize("tool", OPENS_INPUT_LAST)
def test_numbers_have_a_range(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare int or float would let `-1` and `nan` through; only a seed has no range."""
    for command in commands_of(tool, tmp_path / MISSING, monkeypatch):
        bare = [option.option_strings[-1] for option in command.options if option.type in (int, float)]
        assert not [name for name in bare if "seed" not in name], (tool, command.name)


def test_tools_without_a_parser_take_no_arguments() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        assert path.name in TOOLS or "argv" not in path.read_text(encoding="utf-8"), path.name
