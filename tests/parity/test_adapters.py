"""Merged adapters against peft's own merge_and_unload, on transformers' LLaVA and on a language model alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_fixtures import (
    MODEL,
    SHARE4V,
    random_hf_weights,
    write_clip,
    write_llama,
    write_llava_hf,
)
from tolerances import FP32_MODULE

from megatron_share4v.checkpoint.hf.importer import megatron_tensors
from megatron_share4v.checkpoint.hf.source.model import HfSource, open_hf_model

peft = pytest.importorskip("peft", reason="peft is in the dev extra")
DECODER = r".*language_model.*(q_proj|v_proj|down_proj)"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LoraConfig", {"target_modules": DECODER}),
    "rsLoRA": ("LoraConfig", {"target_modules": DECODER, "use_rslora": True}),
    "pissa": ("LoraConfig", {"target_modules": DECODER, "init_lora_weights": "pissa"}),
    "pissa and rsLoRA": ("LoraConfig", {"target_modules": DECODER, "init_lora_weights": "pissa", "use_rslora": True}),
    "olora": ("LoraConfig", {"target_modules": DECODER, "init_lora_weights": "olora"}),
    "orthogonal": ("LoraConfig", {"target_modules": DECODER, "init_lora_weights": "orthogonal"}),
    "DoRA": ("LoraConfig", {"target_modules": DECODER, "use_dora": True}),
    "DoRA and pissa": ("LoraConfig", {"target_modules": DECODER, "use_dora": True, "init_lora_weights": "pissa"}),
    "patterns": (
        "LoraConfig",
        {"target_modules": DECODER, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "tower": ("LoraConfig", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("LoraConfig", {"target_modules": ["lm_head", "q_proj"]}),
    "projector beside": ("LoraConfig", {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector"]}),
    "LoHa": ("LoHaConfig", {"target_modules": DECODER, "r": 4, "alpha": 6}),
    "LoKr": ("LoKrConfig", {"target_modules": DECODER, "r": 2, "alpha": 6}),
    "LoKr of two products": ("LoKrConfig", {"target_modules": DECODER, "r": 1, "alpha": 2, "decompose_both": True}),
    "IA3": ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_hf(tmp_path_factory.mktemp("llava") / "hf")


def train(model: torch.nn.Module, config: Any, directory: Path) -> None:
    """Save an adapter whose trainable weights have moved away from their initial values."""
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(directory)


def merge(model: torch.nn.Module, directory: Path, base: Path, merged: Path) -> Path:
    """Let peft merge an adapter into `model`, and save the result with the base's configuration and tokenizer."""
    peft.PeftModel.from_pretrained(model, directory).merge_and_unload().save_pretrained(merged)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(base / name, merged / name)
    return merged


def largest_difference(found: HfSource, expected: HfSource, base: HfSource) -> tuple[float, int]:
    """Return the largest difference, and how many tensors the adapter changed."""
    actual, reference, before = (
        {name: tensor.read() for name, tensor in megatron_tensors(open_hf_model(source), seed=0).items()}
        for source in (found, expected, base)
    )
    assert actual.keys() == reference.keys()
    changed = sum(not torch.equal(before[name], reference[name]) for name in before)
    return max(float((actual[name] - reference[name]).abs().max()) for name in actual), changed


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, llava: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    def base() -> torch.nn.Module:
        return LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)

    name, settings = CASES[case]
    train(
        base(), getattr(peft, name)(**({"r": 4, "lora_alpha": 8} if name == "LoraConfig" else {}), **settings), tmp_path
    )
    merged = merge(base(), tmp_path, llava, tmp_path / "merged")
    actual, reference = HfSource(directory=tmp_path, base=llava), HfSource(directory=merged)
    difference, changed = largest_difference(actual, reference, HfSource(directory=llava))
    assert difference <= FP32_MODULE and changed >= 5, (difference, changed)


def test_equals_peft_on_a_language_model_alone(tmp_path: Path) -> None:
    """LLaVA's own LoRA files: names of a LlamaForCausalLM, the projector in a file beside them."""
    from transformers import LlamaForCausalLM

    vicuna, clip = write_llama(tmp_path / "vicuna"), write_clip(tmp_path / "clip")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM")
    train(LlamaForCausalLM.from_pretrained(vicuna, dtype=torch.float32), config, tmp_path / "lora")
    projector = random_hf_weights(MODEL, SHARE4V, "projector", seed=5)
    torch.save(projector, tmp_path / "mm_projector.bin")
    beside = {f"base_model.model.{name}": tensor for name, tensor in projector.items()}
    torch.save(beside, tmp_path / "lora" / "non_lora_trainables.bin")
    model = LlamaForCausalLM.from_pretrained(vicuna, dtype=torch.float32)
    merged = merge(model, tmp_path / "lora", vicuna, tmp_path / "merged")
    actual = HfSource(directory=tmp_path / "lora", base=vicuna, tower=clip)
    reference = HfSource(directory=merged, tower=clip, projector=tmp_path / "mm_projector.bin")
    before = HfSource(directory=vicuna, tower=clip, projector=tmp_path / "mm_projector.bin")
    difference, changed = largest_difference(actual, reference, before)
    assert difference <= FP32_MODULE and changed == 12, (difference, changed)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
