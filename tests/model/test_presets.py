"""The presets, built in pairs on the meta device: their parameters add up to the published counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_share4v.config.load import load
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_options import LayerOptions
from megatron_share4v.model.pipeline_split import layers_per_stage
from megatron_share4v.model.share4v import PipelineStage, Share4V

# Published parameters: totals of the safetensors files, a tied matrix counted once (the file of Qwen3-1.7B repeats it);
# of Vicuna, whose files are no safetensors, the number of the LLaMA 2 that it was trained from.
LANGUAGE_MODELS = {
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "llama_3_8b": 8_030_261_248,
    "llama_3.1_8b": 8_030_261_248,
    "llama_3.2_1b": 1_235_814_400,
    "llama_3.2_3b": 3_212_749_824,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "mistral_7b": 7_241_732_096,
}
# Towers: published parameters of the whole vision model, those of a block, and those of what is never built beside the
# last block: the norm after the blocks, SigLIP's pooling head (a query, an attention, a norm, an MLP), DINOv2's mask
# token. CLIP and DINOv2: counted by transformers of the published config.json; SigLIP: its paper's SO400M, likewise.
SIGLIP_HEAD = 1152 + (4 * 1152**2 + 4 * 1152) + 2 * 1152 + (2 * 1152 * 4304 + 4304 + 1152)
TOWERS = {
    "clip_l_336": (303_507_456, 12_596_224, 2 * 1024),
    "siglip_so400m_384": (428_225_600, 15_239_504, 2 * 1152 + SIGLIP_HEAD),
    "siglip2_so400m_384": (428_225_600, 15_239_504, 2 * 1152 + SIGLIP_HEAD),
    "dinov2_l": (304_368_640, 12_598_272, 2 * 1024 + 1024),
}
PAIRS = [("clip_l_336", language) for language in LANGUAGE_MODELS] + [
    (tower, "qwen2.5_0.5b") for tower in TOWERS if tower != "clip_l_336"
]


@pytest.fixture(scope="module")
def presets(repository: Path) -> Path:
    return repository / "examples" / "models"


def build(model: ModelConfig, mesh: Mesh) -> Share4V:
    parallel = ParallelConfig()
    with torch.device("meta"):
        chunk = Share4V(
            model,
            mesh=mesh,
            parallel=parallel,
            dtype=torch.bfloat16,
            ops="reference",
            options=LayerOptions(),
            layers_per_stage=layers_per_stage(model, parallel),
            pipeline_stage=PipelineStage(stage=0, num_stages=1, chunk=None),
        )
    assert all(parameter.is_meta for parameter in chunk.parameters()), "building took memory"
    return chunk


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("tower", "language"), PAIRS)
def test_parameter_counts_are_the_published_ones(
    tower: str, language: str, mesh: Mesh, presets: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").symlink_to(presets)
    (tmp_path / "pair.yaml").write_text(f"vision: {tower}\nlanguage: {language}\n", encoding="utf-8")
    model = load(ModelConfig, tmp_path / "pair.yaml")
    chunk = build(model, mesh)
    whole, block, beside = TOWERS[tower]
    assert count(chunk.vision.layers[0]) == block
    assert count(chunk.vision) == whole - block - beside
    inner, width = model.vision.feature_width, model.language.hidden_size
    assert count(chunk.projector) == inner * width + width + width**2 + width
    assert count(chunk.language) == LANGUAGE_MODELS[language]
    assert model.language.padded_vocab_size == model.language.vocab_size, (
        "published tables have rows of a multiple of 64"
    )


@pytest.mark.parametrize(("size", "projector"), [("7b", 20_979_712), ("13b", 31_467_520)])
def test_share4v_is_the_published_model(size: str, projector: int, mesh: Mesh, presets: Path) -> None:
    model = load(ModelConfig, presets / f"share4v_{size}.yaml")
    chunk = build(model, mesh)
    assert (count(chunk.projector), count(chunk.language)) == (projector, LANGUAGE_MODELS[f"vicuna_{size}"])


def test_every_preset_has_a_published_size(presets: Path) -> None:
    for kind, cls, known in (("language", LanguageConfig, LANGUAGE_MODELS), ("vision", VisionConfig, TOWERS)):
        paths = [path for path in (presets / kind).glob("*.yaml") if not path.stem.startswith("quickstart")]
        assert {path.stem for path in paths} == set(known)
        for path in paths:
            load(cls, path)
    for name, size in LANGUAGE_MODELS.items():
        assert f"{size:,} parameters" in (presets / f"language/{name}.yaml").read_text(encoding="utf-8")
