"""Adapters of peft merged with their base: each kind by its formula, any release's names, and what is refused.

tests/parity/test_adapters.py compares the same merges with peft's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_fixtures import MODEL, SHARE4V, random_hf_weights, read_safetensors, write_json, write_llava_hf, write_weights

from megatron_share4v.checkpoint.hf.importer import megatron_tensors
from megatron_share4v.checkpoint.hf.source.model import HfSource, open_hf_model
from megatron_share4v.errors import ConversionError

QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
DOWN = "language_model.model.layers.2.mlp.down_proj.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
TOWER = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
PROJECTOR = "multi_modal_projector.linear_1.weight"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "init_lora_weights": True, "bias": "none"}
Tensors = dict[str, torch.Tensor]

# Prefixes that the releases of transformers, and its language model alone, put before the same tensors.
RELEASES: dict[str, dict[str, str]] = {
    "transformers 4.51": {},
    "transformers 4.52": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "transformers 5": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "official": {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_tower.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    },
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def renamed(name: str, release: str) -> str:
    for old, new in RELEASES[release].items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def low_rank(base: Tensors, name: str, rank: int = 2) -> tuple[Tensors, torch.Tensor]:
    """Return the LoRA factors of a weight by their names after the module's, and B A."""
    down, up = random(rank, base[name].shape[1]), random(base[name].shape[0], rank)
    return {"lora_A.weight": down, "lora_B.weight": up}, up @ down


def write_adapter(
    directory: Path, factors: dict[str, Tensors], config: dict[str, object], *, release: str = "transformers 5"
) -> Path:
    """Write an adapter; `factors` by the weight's llava-hf name, or {"": tensor} for a weight stored whole."""
    tensors = {}
    for name, parts in factors.items():
        stem = f"base_model.model.{renamed(name, release)}"
        for part, tensor in parts.items():
            tensors[f"{stem.removesuffix('.weight')}.{part}" if part else stem] = tensor
    directory.mkdir(parents=True)
    torch.save(tensors, directory / "adapter_model.bin")
    write_json(directory / "adapter_config.json", config)
    return directory


def opened(source: HfSource) -> Tensors:
    return {name: tensor.read() for name, tensor in megatron_tensors(open_hf_model(source), seed=0).items()}


def check_merge(base: Path, adapter: Path, changed: Tensors, tmp_path: Path) -> None:
    """Compare the merge with a model whose tensors `changed` were replaced; check that it is not the base."""
    shutil.copytree(base, tmp_path / "merged")
    write_weights(tmp_path / "merged", {**read_safetensors(base), **changed})
    found, expected = opened(HfSource(directory=adapter, base=base)), opened(HfSource(directory=tmp_path / "merged"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)
    before = opened(HfSource(directory=base))
    assert sum(not torch.equal(before[name], tensor) for name, tensor in found.items()) == len(changed)


@pytest.fixture
def base(llava: Path) -> Tensors:
    return read_safetensors(llava)


@pytest.mark.parametrize("release", RELEASES)
def test_names_of_every_release(release: str, llava: Path, base: Tensors, tmp_path: Path) -> None:
    parts, changed = {}, {}
    for name in (QUERY, DOWN, TOWER):
        parts[name], change = low_rank(base, name)
        changed[name] = base[name] + 4 * change
    parts[PROJECTOR] = {"": random(*base[PROJECTOR].shape)}
    adapter = write_adapter(tmp_path / "adapter", parts, LORA, release=release)
    check_merge(llava, adapter, {**changed, PROJECTOR: parts[PROJECTOR][""]}, tmp_path)


def dora(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    return magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)


def without_principal(weight: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    values[:rank] = 0
    return ((left * values) @ right).float()


def without_first_columns(weight: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    first = weight[:, :rank].double()
    onto = first @ torch.linalg.inv(first.t() @ first) @ first.t()
    return (weight - scale * (onto @ weight.double())).float()


Merge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SETTINGS: dict[str, tuple[dict[str, object], Merge]] = {
    "rsLoRA": ({"use_rslora": True}, lambda weight, change: weight + 8 / 2**0.5 * change),
    "pissa": ({"init_lora_weights": "pissa"}, lambda weight, change: without_principal(weight, 2) + 4 * change),
    "olora": ({"init_lora_weights": "olora"}, lambda weight, change: without_first_columns(weight, 2, 4) + 4 * change),
    "gaussian": ({"init_lora_weights": "gaussian"}, lambda weight, change: weight + 4 * change),
    "eva": ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, lambda weight, change: weight + 4 * change),
    "alpha of a module": ({"alpha_pattern": {"q_proj": 2}}, lambda weight, change: weight + change),
    "alpha by expression": (
        {"alpha_pattern": {r"layers\.[01]\..*_proj": 6}},
        lambda weight, change: weight + 3 * change,
    ),
    "alpha of another": ({"alpha_pattern": {"proj": 2}}, lambda weight, change: weight + 4 * change),
    "rank of a module": ({"r": 5, "rank_pattern": {"q_proj": 2}}, lambda weight, change: weight + 4 * change),
    "unset keys of later versions": ({"use_magic": None, "magic": {}}, lambda weight, change: weight + 4 * change),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_lora(case: str, llava: Path, base: Tensors, tmp_path: Path) -> None:
    settings, merge = SETTINGS[case]
    factors, change = low_rank(base, QUERY)
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors}, {**LORA, **settings})
    check_merge(llava, adapter, {QUERY: merge(base[QUERY], change)}, tmp_path)


def test_a_stored_base_weight_is_the_one_that_was_trained_on(llava: Path, base: Tensors, tmp_path: Path) -> None:
    """peft stores an adapted head or embedding whole: for pissa that is the residual."""
    factors, change = low_rank(base, QUERY)
    residual = without_principal(base[QUERY], 2)
    adapter = write_adapter(
        tmp_path / "adapter",
        {QUERY: {**factors, "base_layer.weight": residual}},
        {**LORA, "init_lora_weights": "pissa"},
    )
    check_merge(llava, adapter, {QUERY: residual + 4 * change}, tmp_path)


def test_other_formulas(llava: Path, base: Tensors, tmp_path: Path) -> None:
    """DoRA, an embedding, LoHa, LoKr, and IA3 with and without a bias."""
    factors, change = low_rank(base, QUERY)
    magnitude = random(48).abs()
    adapter = write_adapter(
        tmp_path / "dora", {QUERY: {**factors, "lora_magnitude_vector": magnitude}}, {**LORA, "use_dora": True}
    )
    check_merge(llava, adapter, {QUERY: dora(base[QUERY] + 4 * change, magnitude)}, tmp_path / "1")
    rows, width = base[EMBEDDING].shape
    down, up = random(2, rows), random(width, 2)
    adapter = write_adapter(
        tmp_path / "embedding", {EMBEDDING: {"lora_embedding_A": down, "lora_embedding_B": up}}, LORA
    )
    check_merge(llava, adapter, {EMBEDDING: base[EMBEDDING] + 4 * (up @ down).t()}, tmp_path / "2")
    inputs = base[DOWN].shape[1]
    one, other = (random(48, 2), random(2, inputs)), (random(48, 2) + 1, random(2, inputs) - 1)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    adapter = write_adapter(
        tmp_path / "loha", {DOWN: dict(zip(names, (*one, *other)))}, {"peft_type": "LOHA", "r": 2, "alpha": 6}
    )
    product = (one[0] @ one[1]) * (other[0] @ other[1])
    check_merge(llava, adapter, {DOWN: base[DOWN] + 3 * product}, tmp_path / "3")
    small, left, right = random(6, 8), random(8, 2), random(2, inputs // 8)
    adapter = write_adapter(
        tmp_path / "lokr",
        {DOWN: {"lokr_w1": small, "lokr_w2_a": left, "lokr_w2_b": right}},
        {"peft_type": "LOKR", "r": 2, "alpha": 6, "decompose_factor": -1},
    )
    check_merge(llava, adapter, {DOWN: base[DOWN] + 3 * torch.kron(small, left @ right)}, tmp_path / "4")
    outputs, tower = random(1, inputs), random(32, 1)
    adapter = write_adapter(
        tmp_path / "ia3",
        {DOWN: {"ia3_l": outputs}, TOWER: {"ia3_l": tower}},
        {"peft_type": "IA3", "feedforward_modules": ["down_proj"], "target_modules": ["q_proj", "down_proj"]},
    )
    bias = TOWER.replace("weight", "bias")
    changed = {DOWN: base[DOWN] * outputs, TOWER: base[TOWER] * tower, bias: base[bias] * tower.flatten()}
    check_merge(llava, adapter, changed, tmp_path / "5")


def test_a_merge_is_rounded_once(tmp_path: Path) -> None:
    llava = write_llava_hf(tmp_path / "hf", dtype="bf16")
    base = read_safetensors(llava)
    factors, change = low_rank(base, QUERY)
    adapter = write_adapter(tmp_path / "adapter", {QUERY: factors}, LORA)
    merged = opened(HfSource(directory=adapter, base=llava))[
        "language.decoder.layers.1.self_attention.linear_qkv.weight"
    ]
    expected = (base[QUERY].float() + 4 * change).bfloat16()
    assert merged.dtype == torch.bfloat16 and torch.equal(merged[:24], expected[:24])


def test_the_base_says_how_pictures_are_prepared(llava: Path, base: Tensors, tmp_path: Path) -> None:
    """An adapter's folder has no image processor of its own."""
    copied = Path(shutil.copytree(llava, tmp_path / "hf"))
    size = {"size": 28, "crop_size": 28}
    write_json(copied / "preprocessor_config.json", {"do_pad": True, **size})
    adapter = write_adapter(tmp_path / "adapter", {QUERY: low_rank(base, QUERY)[0]}, LORA)
    assert open_hf_model(HfSource(directory=adapter, base=copied)).image_aspect_ratio == "pad"


PLAIN = ("lora_A.weight", "lora_B.weight")
REFUSED: dict[str, tuple[dict[str, object], dict[str, tuple[int, ...]], str]] = {
    "no kind": ({"peft_type": None}, {}, "peft_type is None"),
    "a list of kinds": ({"peft_type": ["LORA"]}, {}, r"peft_type is \['LORA'\]"),
    "another kind": ({"peft_type": "VERA"}, {}, "peft_type is 'VERA', which is not merged here"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, {}, "'PROMPT_TUNING', which adds virtual tokens"),
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, {}, "there is nothing to merge"),
    "random decomposition": ({"init_lora_weights": "pissa_niter_16"}, {}, "init_lora_weights is 'pissa_niter_16'"),
    "quantised base": (
        {"init_lora_weights": "loftq", "loftq_config": {"bits": 4}},
        {},
        "is 'loftq': the adapter belongs",
    ),
    "corda": ({"init_lora_weights": "corda"}, {}, "init_lora_weights is 'corda'"),
    "later initialisation": ({"init_lora_weights": "next"}, {}, "init_lora_weights is 'next'"),
    "qalora": ({"use_qalora": True}, {}, "use_qalora is True, which is not merged here"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, {}, r"alora_invocation_tokens is \[1\]"),
    "trained rows": ({"trainable_token_indices": [3]}, {}, "trainable_token_indices is"),
    "more layers": ({"layer_replication": [[0, 2], [1, 4]]}, {}, "layer_replication is"),
    "Conv1D": ({"fan_in_fan_out": True}, {}, "fan_in_fan_out is True"),
    "biases of factors": ({"lora_bias": True}, {}, "lora_bias is True"),
    "later key": ({"use_magic": True}, {}, "use_magic is True"),
    "no rank": ({"r": None}, {}, "r is None; expected a positive integer"),
    "half a rank": ({"r": 2.5}, {}, "r is 2.5; expected a positive integer"),
    "a rank of true": ({"r": True}, {}, "r is True; expected a positive integer"),
    "alpha of no value": ({"lora_alpha": float("nan")}, {}, "lora_alpha is nan; expected a positive number"),
    "ranks in a list": ({"rank_pattern": ["q_proj"]}, {}, "rank_pattern is .*; expected an object"),
    "a rank in words": ({"rank_pattern": {"q_proj": "x"}}, {}, r"rank_pattern\['q_proj'\] is 'x'; expected"),
    "alpha in words": (
        {"alpha_pattern": {"q_proj": "x"}},
        {},
        r"alpha_pattern\['q_proj'\] is 'x'; expected",
    ),
    "no expression": ({"rank_pattern": {"q_proj(": 2}}, {}, "'q_proj.', which is no regular expression"),
    "no tensors": ({}, {}, "adapter_model.bin: holds no tensors"),
    "no alpha": ({"lora_alpha": "8"}, {}, "lora_alpha is '8'; expected a positive number"),
    "half a pair": ({}, {"lora_B.weight": (48, 2)}, "q_proj has lora_B, which is no complete set"),
    "another rank": ({}, dict(zip(PLAIN, ((3, 48), (48, 3)))), "lora_A is .3, 48., and .*states rank 2"),
    "another width": (
        {},
        dict(zip(PLAIN, ((2, 40), (48, 2)))),
        "is .48, 48. in the base, and in the adapter lora_A .2, 40.",
    ),
    "magnitudes too many": (
        {},
        {**dict(zip(PLAIN, ((2, 48), (48, 2)))), "lora_magnitude_vector": (48,)},
        "a lora_magnitude_vector, and .* use_dora False",
    ),
    "magnitudes missing": ({"use_dora": True}, dict(zip(PLAIN, ((2, 48), (48, 2)))), "no lora_magnitude_vector"),
    "unknown factor": ({}, {"lora_E": (2, 1)}, "q_proj.lora_E belongs to no adapted module"),
    "bias of a factor": ({}, {"lora_B.bias": (48,)}, "biases of factors"),
    "a weight of another shape": (
        {},
        {"base_layer.weight": (40, 48)},
        "q_proj.weight is .40, 48., in the base .48, 48.",
    ),
    "IA3 for another width": (
        {"peft_type": "IA3", "r": 0, "lora_alpha": 0, "init_lora_weights": False, "bias": None},
        {"ia3_l": (40, 1)},
        "in the adapter ia3_l .40, 1.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, llava: Path, tmp_path: Path) -> None:
    settings, shapes, words = REFUSED[case]
    factors = {QUERY: {part: random(*shape) for part, shape in shapes.items()}}
    adapter = write_adapter(tmp_path / "adapter", factors, {**LORA, **settings})
    with pytest.raises(ConversionError, match=words):
        open_hf_model(HfSource(directory=adapter, base=llava))


def test_an_adapter_of_another_model(llava: Path, base: Tensors, tmp_path: Path) -> None:
    factors = low_rank(base, QUERY)[0]
    adapter = write_adapter(tmp_path / "a", {QUERY.replace("layers.1", "layers.9"): factors}, LORA)
    with pytest.raises(ConversionError, match="adapts model.language_model.layers.9.self_attn.q_proj, and the base"):
        open_hf_model(HfSource(directory=adapter, base=llava))
    resampler = "vision_resampler.proj.weight"
    adapter = write_adapter(tmp_path / "b", {resampler: {"": random(3, 3)}}, LORA)
    with pytest.raises(ConversionError, match="vision_resampler.proj.weight belongs to no adapted module"):
        open_hf_model(HfSource(directory=adapter, base=llava))
    adapter = write_adapter(tmp_path / "c", {QUERY: factors}, LORA)
    twice = {
        f"base_model.model.{prefix}layers.1.self_attn.q_proj.{part}": tensor
        for prefix in ("model.language_model.", "language_model.model.")
        for part, tensor in factors.items()
    }
    torch.save(twice, adapter / "adapter_model.bin")
    with pytest.raises(ConversionError, match="two modules of it adapt language_model.model.layers.1"):
        open_hf_model(HfSource(directory=adapter, base=llava))


def test_weights_beside_an_adapter_fit_the_base(llava: Path, base: Tensors, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {QUERY: low_rank(base, QUERY)[0]}, LORA)
    projector = random_hf_weights(MODEL, SHARE4V, "projector")
    wrong = {f"base_model.model.{name}": tensor[:-1] for name, tensor in projector.items()}
    torch.save(wrong, adapter / "non_lora_trainables.bin")
    with pytest.raises(ConversionError, match="non_lora_trainables.bin: wrong shape: .*mm_projector.0"):
        open_hf_model(HfSource(directory=adapter, base=llava))
