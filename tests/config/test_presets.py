"""Sections written as the name of a preset: where the file is found, what it replaces, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_share4v.config.load import dump, json_schema, load
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.config.presets import find_preset, is_name
from megatron_share4v.config.run import RunConfig
from megatron_share4v.errors import ConfigError

RUN = "run: {directory: r}\ndata: {train: d, tokenizer: t}\ntrain: {global_batch_size: 8}\n"
SMALL = "hidden_size: 256\nnum_layers: 3\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with presets in models/ and a working directory of its own."""
    write(tmp_path / "models/vision/eye.yaml", "num_layers: 6\nhidden_size: 512\n")
    write(tmp_path / "models/language/small_1.5b.yaml", SMALL)
    write(tmp_path / "models/language/large_7b.yaml", "base: small_1.5b.yaml\nnum_layers: 9\n")
    write(tmp_path / "models/projector/line.yaml", "type: linear\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def model_of(path: Path, section: str, *overrides: str) -> ModelConfig:
    return load(RunConfig, write(path, f"{RUN}model: {section}\n"), overrides).model


def problem(path: Path, section: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        model_of(path, section, *overrides)
    return str(raised.value)


def test_sections_compose_by_name(folder: Path) -> None:
    model = model_of(folder / "runs/a.yaml", "{vision: eye, projector: line, language: large_7b}")
    assert (model.vision.num_layers, model.vision.hidden_size) == (6, 512)
    assert (model.projector.type, model.language.num_layers, model.language.hidden_size) == ("linear", 9, 256)
    assert model.vision == dataclasses.replace(VisionConfig(), num_layers=6, hidden_size=512)


def test_name_as_base_with_changed_fields(folder: Path) -> None:
    text = "{language: {base: small_1.5b, max_position_embeddings: 8192}, vision: {base: [eye], num_layers: 5}}"
    model = model_of(folder / "runs/a.yaml", text)
    assert model.language == LanguageConfig(hidden_size=256, num_layers=3, max_position_embeddings=8192)
    assert (model.vision.num_layers, model.vision.hidden_size) == (5, 512)


def test_paths_keep_working_and_may_stand_alone(folder: Path) -> None:
    for text in ("{base: ../models/language/large_7b.yaml}", "../models/language/large_7b.yaml"):
        assert model_of(folder / "runs/a.yaml", f"{{language: {text}}}").language.num_layers == 9


def test_model_file_composes_for_itself_and_for_a_run(folder: Path) -> None:
    whole = write(folder / "models/pair.yaml", "vision: eye\nlanguage: small_1.5b\n")
    assert load(ModelConfig, whole) == model_of(folder / "runs/deep/a.yaml", "{base: ../../models/pair.yaml}")


def test_preset_replaces_the_section_of_a_base_file(folder: Path) -> None:
    write(folder / "models/other.yaml", "language: {rope_theta: 5e5, num_key_value_heads: 8}\nvision: eye\n")
    for text in ("small_1.5b", "{base: small_1.5b}"):
        model = model_of(folder / "runs/a.yaml", f"{{base: ../models/other.yaml, language: {text}}}")
        assert model.language == LanguageConfig(hidden_size=256, num_layers=3), "no value of the other model stays"
        assert model.vision.num_layers == 6
    changed = model_of(folder / "runs/a.yaml", "{base: ../models/other.yaml, vision: {num_layers: 4}}")
    assert (changed.vision.num_layers, changed.vision.hidden_size) == (4, 512)


@pytest.mark.parametrize(
    "override",
    ["model.language=large_7b", "model.language.base=large_7b", "model={language: large_7b, vision: eye}"],
)
def test_override_searches_from_the_configuration_file(folder: Path, override: str) -> None:
    path = folder / "runs/a.yaml"
    model = model_of(path, "{vision: eye, language: {rope_theta: 5e5}}", override)
    assert (model.language.num_layers, model.language.rope_theta, model.vision.num_layers) == (9, 10000.0, 6)
    later = model_of(path, "{vision: eye}", override, "model.language.num_layers=2")
    assert (later.language.num_layers, later.language.hidden_size) == (2, 256)


def test_nearest_preset_is_taken(folder: Path) -> None:
    run = folder / "a/b/run.yaml"
    for depth, path in enumerate(
        ["models/eye.yaml", "a/models/eye.yaml", "a/models/vision/eye.yaml", "a/b/models/eye.yaml", "a/b/eye.yaml"], 10
    ):
        write(folder / path, f"num_layers: {depth}\n")
        # The first lies farther than models/vision/eye.yaml, which has 6.
        assert model_of(run, "{vision: eye}").vision.num_layers == (6 if depth == 10 else depth), path


def test_model_may_be_called_like_its_tower(folder: Path) -> None:
    assert load(ModelConfig, write(folder / "models/eye.yaml", "vision: eye\n")).vision.num_layers == 6


def test_relative_paths_name_files_from_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_preset("eye", "vision", folder=Path("runs")) == Path("models/vision/eye.yaml")
    write(folder / "models/vision/eye.yaml", "# comment\nzebra: 1\n")
    found = problem(Path("runs/a.yaml"), "{vision: eye}")
    assert found.startswith("models/vision/eye.yaml:2: model.vision.zebra: unknown key; known here: model_type")


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("{language: large_8b}", "language", "there is no preset 'large_8b'; did you mean large_7b?"),
        ("{language: {base: eye}}", "language", "there is no preset 'eye'; known names: large_7b, small_1.5b"),
        ("{projector: x}", "projector", "there is no preset 'x'; known names: line"),
        ("{vision: ''}", "vision", "there is no preset ''; known names: eye"),
    ],
)
def test_unknown_name(folder: Path, section: str, key: str, message: str) -> None:
    path = folder / "runs/a.yaml"
    found = problem(path, section)
    name = section.split("'")[1] if "'" in section else section.strip("{}").split()[-1]
    places = f"{folder}/runs, {folder}/models/{key}, {folder}/models"
    assert found.startswith(f"{path}:4: model.{key}: {message} (searched for {name}.yaml in {places}")


def test_unknown_name_on_the_command_line(folder: Path) -> None:
    found = problem(folder / "runs/a.yaml", "{}", "model.language=large_8b")
    assert found.startswith("command line: model.language=large_8b: model.language: there is no preset 'large_8b'; did")


def test_folder_without_presets(tmp_path: Path) -> None:
    found = problem(tmp_path / "a.yaml", "{vision: eye}")
    assert (
        "there is no preset 'eye'; write a section of `key: value` lines, or a path that ends with .yaml, as of the"
        in found
    )
    write(tmp_path / "models/pair.yaml", "language: {num_layers: 2}\n")
    assert "pair" not in problem(tmp_path / "a.yaml", "{projector: mlp2x_gelu}").partition("(searched")[0]


def test_errors_of_files_name_their_place(folder: Path) -> None:
    path = folder / "runs/a.yaml"
    assert problem(path, "{language: none.yaml}") == (
        f"{path}:4: base: {folder}/runs/none.yaml: cannot be read: No such file or directory"
    )
    assert problem(path, "{language: 7}").startswith(f"{path}:4: model.language: should be a section of")
    write(folder / "models/vision/round.yaml", "base: round.yaml\n")
    assert "a file cannot be its own base (a.yaml -> round.yaml -> round.yaml)" in problem(path, "{vision: round}")
    write(folder / "models/vision/loop.yaml", "base: pool\n")
    write(folder / "models/vision/pool.yaml", "base: loop\n")
    chain = "the preset 'loop' cannot be its own base (a.yaml -> loop.yaml -> pool.yaml -> loop.yaml)"
    assert chain in problem(path, "{vision: loop}")
    assert "there is no file 'Qwen/large_7b'; the name of a preset has no folder, as in large_7b, and" in problem(
        path, "{language: Qwen/large_7b}"
    )
    assert problem(path, "{trainable: eye}").startswith(f"{path}:4: model.trainable: should be a section of")


def test_presets_without_effect_are_refused(folder: Path) -> None:
    path = folder / "runs/a.yaml"
    write(folder / "models/vision/blank.yaml", "# nothing yet\n")
    assert problem(path, "{vision: blank}").endswith(
        f"model.vision: the preset {folder}/models/vision/blank.yaml is empty"
    )
    found = problem(path, "{language: {base: [small_1.5b, large_7b]}}")
    assert "model.language: the preset 'large_7b' would replace 'small_1.5b' before it; put a preset first" in found


def test_dump_holds_values_not_names(folder: Path) -> None:
    model = model_of(folder / "runs/a.yaml", "{vision: eye, language: large_7b}")
    assert "eye" not in dump(model) and load(ModelConfig, write(folder / "x.yaml", dump(model))) == model


def test_schema_allows_a_name(folder: Path) -> None:
    properties = json_schema(RunConfig)["$defs"]["ModelConfig"]["properties"]
    for name, section in {
        "vision": "VisionConfig",
        "projector": "ProjectorConfig",
        "language": "LanguageConfig",
    }.items():
        kinds = properties[name]["anyOf"]
        assert kinds[0] == {"$ref": f"#/$defs/{section}"} and kinds[1]["type"] == "string"
    assert "anyOf" not in properties["trainable"]


def test_names_and_paths() -> None:
    assert [is_name(text) for text in ("qwen2.5_7b", "a.yaml", "b.yml", "../a", "models/a")] == [True] + [False] * 4
