"""Check docs/operations.md: the messages of its tables occur in the sources, and its files and options exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from megatron_share4v.config.load import flat, load_run
from megatron_share4v.errors import DamageError, RunStopped, Share4VError
from megatron_share4v.exit_codes import ExitCode

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def messages() -> list[str]:
    """Messages of the troubleshooting table: text between backticks in the first cell of each row."""
    rows = [row for row in section("Troubleshooting by message").splitlines() if row.startswith("| `")]
    return [re.match(r"\| `(.+?)` \|", row)[1] for row in rows]


@cache
def literals() -> str:
    """All message text of the sources: string literals, with NUL for each formatted value, and shell scripts."""
    found = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").rglob("*.sh"))]
    for path in sorted([*(ROOT / "megatron_share4v").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found)


@pytest.mark.parametrize("message", messages())
def test_message_occurs_in_the_sources(message: str) -> None:
    pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
    pattern = r"[^\n]*".join(map(re.escape, pieces))
    assert re.search(pattern, literals()), message


def test_message_missing_from_the_sources_is_found() -> None:
    assert len(messages()) > 20
    assert not re.search(re.escape("message that no source contains"), literals())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:examples|tools)/[\w/.]+\.(?:sh|sbatch|py|yaml)", TEXT))))
def test_file_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_options_exist() -> None:
    known = flat(load_run(ROOT / "examples" / "share4v_7b" / "finetune.yaml"))
    named = set(re.findall(r"`((?:run|parallel|data|train|checkpoint|log|watch)\.[a-z_]+)(?:=\w+|: \w+)?`", TEXT))
    assert len(named) > 10
    assert not {name for name in named if name not in known and not any(key.startswith(f"{name}.") for key in known)}


def test_exit_codes_are_those_of_the_program() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|", section("How a run ends"), flags=re.MULTILINE))
    assert "SIGTERM" in rows[str(int(RunStopped.exit_code))] and "hang" in rows[str(int(ExitCode.HUNG))]
    assert "damaged" in rows[str(DamageError.exit_code)] and "only you" in rows[str(Share4VError.exit_code)]
