"""YAML files with bases and overrides, and the file and line of each value."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_share4v.config.locate import Leaf, Reader, Section, merge


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / "run.yaml"


def read(path: Path) -> tuple[Section, Reader]:
    reader = Reader()
    return reader.read_file(path), reader


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-.5e2", -50.0),
        ("1.5e-3", 1.5e-3),
        ("3", 3),
        ("0.5", 0.5),
        ("null", None),
        ("e5", "e5"),
        ("2e-5x", "2e-5x"),
    ],
)
def test_scalar_types(tmp_path: Path, text: str, value: object) -> None:
    tree, reader = read(write(tmp_path, run=f"a: {text}\n"))
    assert tree.plain() == {"a": value} and type(tree.plain()["a"]) is type(value)
    assert reader.problems == []


def test_location_is_the_line_of_the_key(tmp_path: Path) -> None:
    path = write(tmp_path, run="# comment\na:\n  b: 1\n  c: {d: 2,\n    e: 3}\n")
    tree, _ = read(path)
    for keys, line in {("a",): 2, ("a", "b"): 3, ("a", "c"): 4, ("a", "c", "e"): 5, ("a", "missing"): 2}.items():
        assert tree.place_of(keys) == f"{path}:{line}"
    assert tree.place_of(("missing",)) == str(path)
    assert tree.has(("a", "c", "e")) and not tree.has(("a", "b", "x"))


def test_chained_bases_merge_and_keep_locations(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", first="x: 1\ny: {a: 1, b: 1}\n", second="base: first.yaml\ny: {b: 2}\n")
    path = write(tmp_path, third="z: 3\n", run="base: [sub/second.yaml, third.yaml]\ny: {c: 4}\n")
    tree, reader = read(path)
    assert reader.problems == []
    assert tree.plain() == {"x": 1, "y": {"a": 1, "b": 2, "c": 4}, "z": 3}
    assert tree.place_of(("y", "b")) == f"{tmp_path}/sub/second.yaml:2"
    assert tree.place_of(("y",)) == f"{path}:2"


def test_base_inside_a_section(tmp_path: Path) -> None:
    write(tmp_path, model="width: 8\ndepth: 2\n", whole="model: {depth: 1, name: old}\n")
    tree, reader = read(write(tmp_path, run="base: whole.yaml\nmodel:\n  base: model.yaml\n  width: 16\n"))
    assert reader.problems == []
    assert tree.plain() == {"model": {"width": 16, "depth": 2, "name": "old"}}


def test_empty_file_is_an_empty_section(tmp_path: Path) -> None:
    tree, reader = read(write(tmp_path, run="# nothing\n"))
    assert tree.plain() == {} and reader.complete


@pytest.mark.parametrize(
    ("files", "problem", "complete"),
    [
        ({"run": "a: 1\nb: [1\nc: 2\n"}, "run.yaml:3: not valid YAML: expected ',' or ']'", False),
        ({"run": "a: 1\na: 2\n"}, "run.yaml:2: a: written twice, first at {folder}/run.yaml:1", True),
        (
            {"run": "a: 1\nbase: none.yaml\n"},
            "run.yaml:2: base: {folder}/none.yaml: cannot be read: No such file",
            False,
        ),
        (
            {"run": "base: run.yaml\n"},
            "run.yaml:1: base: {folder}/run.yaml: a file cannot be its own base (run.yaml -> run.yaml)",
            False,
        ),
        (
            {"run": "base: a.yaml\n", "a": "s:\n  base: run.yaml\n"},
            "a.yaml:2: base: {folder}/run.yaml: a file cannot be its own base",
            False,
        ),
        ({"run": "base: {a: 1}\n"}, "run.yaml:1: base: should be a path or a list of paths, got {{'a': 1}}", False),
        ({"run": "base: 3\n"}, "run.yaml:1: base: should be a path or a list of paths, got 3", False),
        ({"run": "just words\n"}, "run.yaml: should hold `key: value` lines, holds 'just words'", False),
        (
            {"run": "a: !!python/name:os.system\n"},
            "run.yaml:1: not valid YAML: could not determine a constructor",
            False,
        ),
        ({"run": "a: 2024-13-45\n"}, "run.yaml: not valid YAML: month must be in 1..12", False),
    ],
)
def test_problems_of_files(tmp_path: Path, files: dict[str, str], problem: str, complete: bool) -> None:
    _, reader = read(write(tmp_path, **files))
    assert len(reader.problems) == 1
    assert reader.problems[0].startswith(f"{tmp_path}/{problem.format(folder=tmp_path)}")
    assert reader.complete is complete


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    for path, reason in {
        tmp_path: "Is a directory",
        tmp_path / "latin.yaml": "not UTF-8 text",
        tmp_path / "no.yaml": "No such file",
    }.items():
        _, reader = read(path)
        assert reader.problems[0].startswith(f"{path}: cannot be read: {reason}")


def test_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, run="a: {b: 1, c: 2}\n", model="width: 4\n")
    monkeypatch.chdir(tmp_path)
    tree, reader = read(path)
    for override in ("a.b=2e-5", "a.d={e: [1, 2]}", "f=", "model.base=model.yaml"):
        tree = merge(tree, reader.read_override(override))
    assert reader.problems == []
    assert tree.plain() == {"a": {"b": 2e-5, "c": 2, "d": {"e": [1, 2]}}, "f": None, "model": {"width": 4}}
    assert tree.place_of(("a", "b")) == "command line: a.b=2e-5"
    assert tree.place_of(("a", "missing")) == f"{path}:1"


@pytest.mark.parametrize(("override", "complete"), [("a", True), ("=3", True), ("a..b=3", True), ("a=[1", False)])
def test_malformed_overrides(override: str, complete: bool) -> None:
    reader = Reader()
    reader.read_override(override)
    assert len(reader.problems) == 1 and reader.problems[0].startswith(f"command line: {override}: ")
    assert reader.complete is complete


def test_merge_replaces_values_by_sections_and_sections_by_values() -> None:
    value, section = Leaf(1, "v"), Section({"a": Leaf(2, "s")}, "s")
    assert merge(value, section) is section
    assert merge(section, value) is value
