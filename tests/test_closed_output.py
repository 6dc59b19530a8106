"""Tools whose output nobody reads any more (`tool | head`) end quietly; other broken pipes stay errors."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path
    for folder in ("tools", "examples/quickstart")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
LONG = """
import sys
from megatron_share4v.errors import exit_on_closed_output, exit_on_user_error
with exit_on_closed_output(), exit_on_user_error():
    for line in range(100_000):
        print(line)
"""
SHORT = """
import sys, time
from megatron_share4v.errors import exit_on_closed_output
with exit_on_closed_output():
    sys.stdin.read()
    print("lost in the buffer until the end")
    sys.exit(3)
"""
OTHER = """
import os
from megatron_share4v.errors import exit_on_closed_output
reader, writer = os.pipe()
os.close(reader)
with exit_on_closed_output():
    os.write(writer, b"x")
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_wrapped(path: Path) -> None:
    """Also scripts that print nothing themselves: argparse prints their --help."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "with exit_on_closed_output():" in ast.unparse(tree.body[-1]), path


def run(code: str, *, close: bool) -> tuple[int, str]:
    """Run a program whose output is read once and closed, or kept; return its exit code and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdin and process.stdout and process.stderr
    if close:
        if code == LONG:
            os.read(process.stdout.fileno(), 10)
        process.stdout.close()
    process.stdin.close()
    errors = process.stderr.read().decode()
    return process.wait(timeout=60), errors


def test_output_closed_while_it_is_written() -> None:
    assert run(LONG, close=True) == (141, "")


def test_output_closed_before_the_last_flush() -> None:
    assert run(SHORT, close=True) == (141, "")
    assert run(SHORT, close=False) == (3, "")


def test_another_broken_pipe_is_an_error() -> None:
    code, errors = run(OTHER, close=False)
    assert code == 1 and "BrokenPipeError" in errors


def test_help_into_closed_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "tools/supervise.py", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
