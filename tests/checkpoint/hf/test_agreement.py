"""transformers and this project agree on exports loaded with Auto classes and on imported saves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_tools import run_tool
from hf_fixtures import (
    MODEL,
    clip_config,
    llama_config,
    read_safetensors,
    write_llava_hf,
    write_tokenizer,
    write_weights,
)

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.config.model import ModelConfig
from megatron_share4v.data.loading.prompt import make_prompt
from megatron_share4v.errors import ConversionError
from megatron_share4v.evaluate.agreement import (
    LOGIT_TOLERANCE,
    Agreement,
    both_logits,
    compare,
    generated_questions,
    largest_difference,
)
from megatron_share4v.infer.session import Session
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A mesh of one process."""
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=60),
        open_mesh(Layout(), device=device) as mesh,
    ):
        yield mesh


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    root = tmp_path_factory.mktemp("exported")
    import_model(
        HfSource(directory=write_llava_hf(root / "hf", dtype=request.param)), root / "megatron", options=ImportOptions()
    )
    export_model(root / "megatron", root / "out", layout="llava-hf")
    return root / "megatron", root / "out"


def test_an_export_computes_what_its_checkpoint_does(exported: tuple[Path, Path], mesh: Mesh) -> None:
    found = compare(*exported, questions=generated_questions(), mesh=mesh, max_new_tokens=12)
    assert found.holds_with_text, found
    assert found.questions == 4 and found.max_logit_diff <= LOGIT_TOLERANCE


def test_an_export_that_was_rounded_is_compared_with_what_was_rounded(
    exported: tuple[Path, Path], mesh: Mesh, tmp_path: Path
) -> None:
    export_model(exported[0], tmp_path / "out", layout="llava-hf", dtype="bf16")
    found = compare(exported[0], tmp_path / "out", questions=generated_questions()[:1], mesh=mesh, max_new_tokens=4)
    assert found.holds and found.max_logit_diff <= LOGIT_TOLERANCE, found


def test_the_tolerance_grows_with_the_logits_alone() -> None:
    """The bound is relative above 1: a trained 7B model has logits of about 30, whose last bits depend on summation
    order.
    """
    found = Agreement(
        questions=1, ids_equal=True, pixels_equal=True, greedy_equal=True, max_logit_diff=1e-3, logit_scale=30.0
    )
    assert found.holds and "accepted: 0.003, for logits up to 30" in str(found)
    assert not replace(found, max_logit_diff=4e-3).holds and not replace(found, logit_scale=1e-3).holds
    assert replace(found, logit_scale=1e-3, max_logit_diff=9e-5).holds and not replace(found, greedy_equal=False).holds
    assert found.holds_with_text and not replace(found, ids_equal=False).holds_with_text
    assert replace(found, ids_equal=False, template="missing").holds


# A chat template as of the published llava-hf models: no system prompt.
WITHOUT_SYSTEM = """\
{% for message in messages %}{{ message['role'] | upper | replace('SYSTEM', '') }}: \
{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} \
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


@pytest.fixture
def published(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """The export without the files that only this package writes."""
    copied = Path(shutil.copytree(exported[1], tmp_path / "published"))
    for name in ("provenance.json", "chat_template.jinja", "chat_template.json"):
        (copied / name).unlink()
    return copied


def test_the_chat_template_is_reported_apart(exported: tuple[Path, Path], published: Path, mesh: Mesh) -> None:
    """A published model computes the same, whatever its chat template does: none, another, one for text alone."""
    checkpoint, questions = exported[0], generated_questions()[:1]
    found = compare(checkpoint, published, questions=questions, mesh=mesh, max_new_tokens=2)
    assert found.holds and found.ids_equal and not found.holds_with_text, found
    assert "chat template missing: the prompts are the checkpoint's, of template vicuna_v1" in str(found)
    (published / "chat_template.jinja").write_text(WITHOUT_SYSTEM)
    found = compare(checkpoint, published, questions=questions, mesh=mesh, max_new_tokens=2)
    assert found.holds and found.ids_equal and not found.holds_with_text, found
    assert "chat template DIFFERENT from the checkpoint's template vicuna_v1: 'USER: <image>" in str(found)
    (published / "chat_template.jinja").write_text("{{ raise_exception('text only') }}")
    found = compare(checkpoint, published, questions=questions, mesh=mesh, max_new_tokens=2)
    assert found.holds and "it cannot render 'generated 0' (text only)" in found.template, found


def test_another_tokenizer_is_reported_apart(exported: tuple[Path, Path], published: Path, mesh: Mesh) -> None:
    """Tokenizers that transformers converted itself drop the space after an image; the computation is the same."""
    path = published / "tokenizer.json"
    content = json.loads(path.read_text())
    steps = content["normalizer"]["normalizers"]
    content["normalizer"]["normalizers"] = [step for step in steps if step["type"] != "Prepend"]
    path.write_text(json.dumps(content))
    found = compare(exported[0], published, questions=generated_questions()[:1], mesh=mesh, max_new_tokens=2)
    assert found.holds and not found.ids_equal and "ids of its tokenizer DIFFERENT" in str(found)


def test_an_own_export_must_have_the_template(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """The tool fails for an export of this package, and not for a published model."""
    copied = Path(shutil.copytree(exported[1], tmp_path / "copied"))
    (copied / "chat_template.jinja").write_text(WITHOUT_SYSTEM)
    (copied / "chat_template.json").unlink()
    command = ("tools/convert.py", "verify", "--hf", copied, "--checkpoint", exported[0], "--logits")
    done = run_tool(*command)
    assert done.returncode == 2 and "chat template DIFFERENT" in done.stderr, done.stderr
    (copied / "provenance.json").unlink()
    done = run_tool(*command)
    assert done.returncode == 0 and "chat template DIFFERENT" in done.stdout, done.stderr


def test_a_difference_is_seen(exported: tuple[Path, Path], mesh: Mesh) -> None:
    """The comparison detects a changed weight."""
    checkpoint, export = exported
    other = export.with_name("other")
    export_model(checkpoint, other, layout="llava-hf")
    weights = read_safetensors(other)
    name, bias = "vision_tower.vision_model.embeddings.class_embedding", "multi_modal_projector.linear_2.bias"
    write_weights(other, {**weights, bias: weights[bias] + 1})
    found = compare(checkpoint, other, questions=generated_questions()[:1], mesh=mesh, max_new_tokens=2)
    assert found.ids_equal and found.pixels_equal and found.max_logit_diff > LOGIT_TOLERANCE and not found.holds
    write_weights(other, {key: tensor for key, tensor in weights.items() if key != name})
    with pytest.raises(ConversionError, match="missing keys: .*class_embedding"):
        compare(checkpoint, other, questions=generated_questions()[:1], mesh=mesh)


def random_llava(model: ModelConfig, **options: object):
    """A model saved by transformers, with weights large enough to affect the logits."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    drop = ("model_type", "architectures")
    vision = CLIPVisionConfig(**{key: value for key, value in clip_config(model).items() if key not in drop})
    text = LlamaConfig(
        **{key: value for key, value in llama_config(model).items() if key not in (*drop, "vocab_size")}, vocab_size=320
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=model.vision.feature_layer,
        image_token_index=300,
        **options,
    )
    torch.manual_seed(11)
    found = LlavaForConditionalGeneration(config).eval()
    for parameter in found.parameters():
        parameter.data.normal_(0.0, 0.15).add_(1.0 if parameter.dim() == 1 and parameter.numel() in (32, 48) else 0.0)
    return found


@pytest.mark.parametrize("feature_layer", [-2, -1, 2])
def test_what_transformers_saved_is_imported(feature_layer: int, mesh: Mesh, tmp_path: Path) -> None:
    model = replace(MODEL, vision=replace(MODEL.vision, feature_layer=feature_layer))
    hf_weights = random_llava(model)
    hf_weights.save_pretrained(tmp_path / "saved")
    request = HfSource(directory=tmp_path / "saved", tokenizer=write_tokenizer(tmp_path / "tokenizer.model"))
    import_model(request, tmp_path / "megatron", options=ImportOptions())
    session = Session.open(tmp_path / "megatron", mesh=mesh)
    assert session.config.model == model
    for question in generated_questions():
        prompt = make_prompt(session.encoder, question.turns, image=question.image, tokens_per_image=4)
        assert largest_difference(*both_logits(session, hf_weights, prompt)) <= LOGIT_TOLERANCE
