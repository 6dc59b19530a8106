"""Sessions open checkpoints and exports alike, and their engine equals the plain reference."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import ask
from exported_model import encode_with_chat_template
from harness import run_world
from hf_fixtures import write_llava_hf
from PIL import Image

from examples.quickstart.tokenizer import train_tokenizer
from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.data.loading.prompt import make_prompt
from megatron_share4v.data.records import Turn
from megatron_share4v.errors import ConfigError, ConversionError, DataError
from megatron_share4v.evaluate.agreement import generated_questions
from megatron_share4v.infer.engine import Engine
from megatron_share4v.infer.session import Session
from megatron_share4v.parallel.layout import Layout
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer

NEW = 10


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    root = tmp_path_factory.mktemp("models")
    import_model(
        HfSource(directory=write_llava_hf(root / "hf")),
        root / "checkpoint",
        options=ImportOptions(template="share4v_v1"),
    )
    export_model(root / "checkpoint", root / "export", layout="llava-hf")
    return root / "checkpoint", root / "export"


def engine_answers(session: Session) -> list[list[int]]:
    patches = session.config.model.vision.num_patches
    prompts = [
        make_prompt(session.encoder, q.turns, image=q.image, tokens_per_image=patches) for q in generated_questions()
    ]
    return ask(Engine.open(session, EngineConfig()), prompts, max_new_tokens=NEW)


def test_checkpoint_and_export_give_equal_answers(
    models: tuple[Path, Path], mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checkpoint, export = (Session.open(path, mesh=mesh, dtype="fp32") for path in models)
    assert not list(tmp_path.iterdir())
    assert export.encoder.template == checkpoint.encoder.template and export.encoder.images == checkpoint.encoder.images
    assert export.encoder.tokenizer.fingerprint == checkpoint.encoder.tokenizer.fingerprint
    expected = checkpoint.answer_ids(generated_questions(), max_new_tokens=NEW)
    assert engine_answers(checkpoint) == engine_answers(export) == expected


def test_engine_equals_transformers(models: tuple[Path, Path], mesh) -> None:
    from megatron_share4v.evaluate import agreement

    session = Session.open(models[1], mesh=mesh, dtype="fp32")
    processor, model = agreement._load(models[1])
    inputs = [encode_with_chat_template(processor, question) for question in generated_questions()]
    assert engine_answers(session) == [agreement._generate_greedy(model, session, one, NEW) for one in inputs]


def test_photographs_are_turned_as_the_checkpoint_says(models: tuple[Path, Path], mesh, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    tagged, upright = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(tagged, "PNG", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(upright, "PNG")
    turned = ImportOptions(image_orientation="exif")
    import_model(HfSource(directory=models[1]), tmp_path / "turned", options=turned)
    for path, is_turned in ((models[0], False), (tmp_path / "turned", True)):
        session = Session.open(path, mesh=mesh)
        one, other = (
            session.prompt([Turn("human", "What?")], images=[file.getvalue()]).pixels for file in (tagged, upright)
        )
        assert torch.equal(one, other) == is_turned


def test_tokenizer_larger_than_the_model_is_rejected(models: tuple[Path, Path], mesh, tmp_path: Path) -> None:
    train_tokenizer(
        ["some words to make other pieces of"] * 9 + [chr(n) * 2 for n in range(0x4E00, 0x4E60)],
        tmp_path / "larger",
        vocab_size=400,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "megatron_share4v.infer.session.open_tokenizer", lambda *_: SentencePieceTokenizer(tmp_path / "larger")
        )
        with pytest.raises(DataError, match="larger: has 400 tokens, the model of .* has 300 ids"):
            Session.open(models[0], mesh=mesh)


def test_pipeline_stages_are_rejected(models: tuple[Path, Path], mesh) -> None:
    session = Session.open(models[0], mesh=mesh)
    staged = replace(session, mesh=replace(mesh, layout=Layout(pipeline=2)))
    with pytest.raises(ConfigError, match="load at pipeline 1"):
        Engine.open(staged, EngineConfig())


def generate_at_tp2(path: Path) -> list[list[int]] | str | None:
    """Answers on TP rank 0, None on rank 1, or the error's text."""
    from megatron_share4v.infer.tp_executor import run_follower
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    with open_mesh(Layout(tensor=2), device=Device("cpu")) as mesh:
        try:
            session = Session.open(path, mesh=mesh, dtype="fp32")
        except ConversionError as error:
            return str(error)
        if mesh.rank:
            return run_follower(Engine.open(session, EngineConfig()).executor)
        patches = session.config.model.vision.num_patches
        prompts = [
            make_prompt(session.encoder, q.turns, image=q.image, tokens_per_image=patches)
            for q in generated_questions()
        ]
        engine = Engine.open(session, EngineConfig())
        answers = ask(engine, prompts, max_new_tokens=NEW)
        engine.close()
        return answers


def test_export_at_tp2(models: tuple[Path, Path], mesh, tmp_path: Path) -> None:
    expected = Session.open(models[0], mesh=mesh, dtype="fp32").answer_ids(generated_questions(), max_new_tokens=NEW)
    assert run_world(2, generate_at_tp2, models[1]) == [expected, None]
    (tmp_path / "config.json").write_text("{}")
    first, second = run_world(2, generate_at_tp2, tmp_path)
    assert first == second and str(tmp_path) in first
