"""The decoder against transformers' models of each family, tiny and random, in this process: logits and all gradients.

LLaMA with scaled rotary frequencies and with biases, Qwen2 tied and untied, Qwen3 (own head width), Mistral.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import FP32_GRADIENT, FP32_MODULE

from megatron_share4v.checkpoint.hf.weight_map import SHARE4V, to_megatron
from megatron_share4v.config.model import LanguageConfig, ModelConfig, RopeScalingConfig, VisionConfig
from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.data.records import Batch
from megatron_share4v.mcore.groups import Mesh, open_mesh
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import fill_parameters, initial_value, iter_shards
from megatron_share4v.ops.op import Implementation
from megatron_share4v.ops.rope import inverse_frequencies
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout

VISION = VisionConfig(
    image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_layers=2, num_attention_heads=2
)
SIZES = LanguageConfig(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
)
LLAMA3 = RopeScalingConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=24)
SAMPLES, LENGTH = 2, 32


@dataclass(frozen=True)
class Family:
    """A transformers model and the fields that describe it."""

    model: str
    fields: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def language(self) -> LanguageConfig:
        """Our configuration."""
        return replace(SIZES, **self.fields)


FAMILIES = {
    "llama, llama3 frequencies": Family("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama, linear frequencies, biases": Family(
        "Llama",
        {"rope_scaling": RopeScalingConfig(rope_type="linear", factor=4.0), "qkv_bias": True, "out_bias": True},
        {"attention_bias": True},
    ),
    "qwen2, tied": Family("Qwen2", {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": True}),
    "qwen2, untied": Family("Qwen2", {"model_type": "qwen2", "qkv_bias": True, "num_key_value_heads": 1}),
    "qwen3": Family("Qwen3", {"model_type": "qwen3", "qk_norm": True, "head_dim": 20, "tie_word_embeddings": True}),
    "mistral": Family("Mistral", {"model_type": "mistral", "head_dim": 8}, {"sliding_window": None}),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    device = Device("cpu")
    with process_group(World.single_process(), device, timeout_s=60), open_mesh(Layout(), device=device) as mesh:
        yield mesh
    assert not dist.is_initialized()


def _rope_parameters(language: LanguageConfig) -> dict[str, Any]:
    scaling = language.rope_scaling
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[scaling.rope_type]
    values = {name: getattr(scaling, name) for name in names}
    return {"rope_type": scaling.rope_type, "rope_theta": language.rope_theta, **values}


def _reference(family: Family) -> torch.nn.Module:
    """Build transformers' model, with weights large enough and unlike enough that every mistake shows."""
    import transformers

    language = family.language
    config = getattr(transformers, f"{family.model}Config")(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_key_value_heads,
        head_dim=language.attention_head_dim,
        max_position_embeddings=language.max_position_embeddings,
        rope_parameters=_rope_parameters(language),
        rms_norm_eps=language.rms_norm_eps,
        tie_word_embeddings=language.tie_word_embeddings,
        **family.config,
    )
    torch.manual_seed(5)
    model = getattr(transformers, f"{family.model}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("ops", ["native", "reference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_equals_transformers(
    name: str, ops: Implementation, mesh: Mesh, request: pytest.FixtureRequest
) -> None:
    """Logits, summed loss and every gradient; in our model nothing else has a parameter."""
    if ops == "native":
        request.getfixturevalue("native_ops")
    family = FAMILIES[name]
    language = family.language
    hf_reference = _reference(family)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, language.vocab_size, (SAMPLES, LENGTH), generator=generator)
    logits = hf_reference(tokens).logits
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    total.backward()
    model = ModelConfig(vision=VISION, language=language)
    named = dict(hf_reference.named_parameters())
    weights, gradients = (
        to_megatron(tensors, model, naming=SHARE4V, components=("language",))
        for tensors in (
            {name: parameter.detach() for name, parameter in named.items()},
            {name: parameter.grad for name, parameter in named.items()},
        )
    )
    (chunk,) = build_chunks(model, mesh=mesh, parallel=ParallelConfig(), dtype=torch.float32, ops=ops)
    filled = set()

    def weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        filled.add(key)
        return weights[key] if key.startswith("language.") else initial_value(key, shape, seed=0, model=model)

    fill_parameters([chunk], weight)
    assert {key for key in filled if key.startswith("language.")} == weights.keys()
    rows = (torch.arange(SAMPLES)[:, None] * LENGTH + torch.arange(LENGTH)).flatten()
    batch = Batch(
        token_ids=tokens,
        image_slots=torch.zeros(0, dtype=torch.int64),
        pixels=torch.zeros(0, 16, 16, 3, dtype=torch.uint8),
        target_rows=rows,
        targets=None,
    )
    with torch.no_grad():
        converted = chunk.forward_logits(batch)[:, : language.vocab_size].view(SAMPLES, LENGTH, -1)
    assert _relative(converted, logits.detach()) <= FP32_MODULE
    labelled = rows.view(SAMPLES, LENGTH)[:, :-1].flatten()
    summed = chunk(replace(batch, target_rows=labelled, targets=tokens[:, 1:].flatten()))
    assert _relative(summed.detach(), total.detach()) <= FP32_MODULE
    summed.backward()
    # With gradients in place of the weights, iter_shards yields gradients.
    for parameter in chunk.language.parameters():
        parameter.data = parameter.grad
    worst = {
        shard.key: _relative(shard.data, shard.slice_from(gradients[shard.key]))
        for shard in iter_shards([chunk])
        if shard.key.startswith("language.")
    }
    assert max(worst.values()) <= FP32_GRADIENT, worst


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.isfinite().all(), "NaN would hide in a maximum"
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScalingConfig(),
        RopeScalingConfig(rope_type="linear", factor=4.0),
        RopeScalingConfig(rope_type="llama3", factor=8.0),
        RopeScalingConfig(rope_type="llama3", factor=32.0),
        RopeScalingConfig(
            rope_type="llama3",
            factor=3.0,
            low_freq_factor=0.5,
            high_freq_factor=7.0,
            original_max_position_embeddings=300,
        ),
    ],
    ids=lambda scaling: f"{scaling.rope_type} {scaling.factor}",
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("width", [64, 80, 128, 6])
def test_inverse_frequencies_equal_transformers_in_every_bit(
    width: int, theta: float, scaling: RopeScalingConfig
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    language = replace(SIZES, head_dim=width, rope_theta=theta, rope_scaling=scaling)
    config = LlamaConfig(
        head_dim=width, num_attention_heads=4, hidden_size=4 * width, rope_parameters=_rope_parameters(language)
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    actual = inverse_frequencies(width, theta=theta, scaling=scaling)
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual, expected)
