"""Tower and decoder alone against transformers' CLIPVisionModel and LlamaForCausalLM, in this process.

Also other feature layers, one key/value head, a linear projector, text without images; and bidirectional attention of
the tower.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tolerances import FP32_MODULE

from megatron_share4v.checkpoint.hf.weight_map import CLIP_IN_MEMORY, SHARE4V, to_megatron
from megatron_share4v.config.model import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.records import Batch
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import fill_parameters, initial_value
from megatron_share4v.model.share4v import Share4V
from megatron_share4v.ops.op import Implementation
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    device = Device("cpu")
    with (
        process_group(World.single_process(), device, timeout_s=60),
        open_mesh(Layout(), device=device) as mesh,
    ):
        yield mesh
    assert not dist.is_initialized()


def _vision(feature_layer: int = -2) -> VisionConfig:
    return VisionConfig(
        image_size=24,
        patch_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_attention_heads=2,
        feature_layer=feature_layer,
    )


def _language() -> LanguageConfig:
    return LanguageConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_layers=2, num_attention_heads=4, num_key_value_heads=1
    )


@pytest.fixture(params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Implementation:
    """Both implementations of the fused ops."""
    if request.param == "native":
        request.getfixturevalue("native_ops")
    return request.param


def _build(
    model: ModelConfig, mesh: Mesh, weights: dict[str, torch.Tensor], ops: Implementation = "reference"
) -> Share4V:
    """Build a chunk with `weights`, and initial values for the rest."""
    (chunk,) = build_chunks(model, mesh=mesh, parallel=ParallelConfig(), dtype=torch.float32, ops=ops)
    fill_parameters(
        [chunk],
        lambda name, shape: weights[name] if name in weights else initial_value(name, shape, seed=0, model=model),
    )
    return chunk


def _perturbed(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _clip(vision: VisionConfig) -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="quick_gelu",
    )
    return _perturbed(CLIPVisionModel(config))


@pytest.mark.parametrize("feature_layer", [-1, -2, 1, 0])
@torch.no_grad()
def test_tower_equals_clip(feature_layer: int, mesh: Mesh, ops: Implementation) -> None:
    model = ModelConfig(vision=_vision(feature_layer), language=_language())
    clip = _clip(model.vision)
    chunk = _build(
        model, mesh, to_megatron(clip.state_dict(), model, naming=CLIP_IN_MEMORY, components=("vision",)), ops
    )
    pixels = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8)
    reference = clip(
        normalise(pixels, dtype=torch.float32, vision=model.vision), output_hidden_states=True
    ).hidden_states[feature_layer][:, 1:]
    difference = (chunk.vision(pixels).transpose(0, 1) - reference).abs().max() / reference.abs().max()
    assert len(chunk.vision.layers) == model.vision.num_built_layers
    assert difference <= FP32_MODULE


@torch.no_grad()
def test_tower_attention_is_bidirectional(mesh: Mesh) -> None:
    model = ModelConfig(vision=_vision(), language=_language())
    tower = _build(
        model, mesh, to_megatron(_clip(model.vision).state_dict(), model, naming=CLIP_IN_MEMORY, components=("vision",))
    ).vision
    pixels = torch.randint(0, 256, (1, 24, 24, 3), dtype=torch.uint8)
    changed = pixels.clone()
    changed[:, -8:, -8:] ^= 255
    assert (tower(pixels)[0] - tower(changed)[0]).abs().max() > 1e-3, (
        "the last patch does not reach the first: the tower is causal"
    )


@torch.no_grad()
def test_decoder_equals_llama(mesh: Mesh, ops: Implementation) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    language = _language()
    model = ModelConfig(vision=_vision(), language=language)
    torch.manual_seed(4)
    llama = _perturbed(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=language.vocab_size,
                hidden_size=language.hidden_size,
                intermediate_size=language.intermediate_size,
                num_hidden_layers=language.num_layers,
                num_attention_heads=language.num_attention_heads,
                num_key_value_heads=language.num_key_value_heads,
                rms_norm_eps=language.rms_norm_eps,
                tie_word_embeddings=False,
            )
        )
    )
    chunk = _build(model, mesh, to_megatron(llama.state_dict(), model, naming=SHARE4V, components=("language",)), ops)
    tokens = torch.randint(0, language.vocab_size, (2, 12))
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        token_ids=tokens,
        image_slots=none,
        pixels=torch.zeros(0, 24, 24, 3, dtype=torch.uint8),
        target_rows=torch.arange(24),
        targets=none,
    )
    reference = llama(tokens).logits
    actual = chunk.forward_logits(batch)[:, : language.vocab_size].view(2, 12, -1)
    assert (actual - reference).abs().max() / reference.abs().max() <= FP32_MODULE


@torch.no_grad()
def test_linear_projector_is_one_matrix(mesh: Mesh) -> None:
    model = ModelConfig(vision=_vision(), language=_language(), projector=ProjectorConfig(type="linear"))
    reference = torch.nn.Linear(32, 32)
    published = {f"model.mm_projector.{name}": tensor for name, tensor in reference.state_dict().items()}
    chunk = _build(model, mesh, to_megatron(published, model, naming=SHARE4V, components=("projector",)))
    features = torch.randn(9, 2, 32)
    torch.testing.assert_close(chunk.projector(features), reference(features), rtol=FP32_MODULE, atol=FP32_MODULE)
