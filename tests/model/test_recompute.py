"""Activation recomputation: bytes that a forward pass saves for its backward pass, and equal gradients."""

from __future__ import annotations

import pytest
import torch
from harness import run_world
from tiny import micro_batches, tiny_model

from megatron_share4v.config.training import TrainConfig
from megatron_share4v.errors import ConfigError
from megatron_share4v.mcore.layer_options import layer_options

CHOICES = {
    "none": {},
    "attention": {"recompute": "selective"},
    "attention and mlp": {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")},
    "two layers": {"recompute": "full", "recompute_layers": 2},
    "full": {"recompute": "full"},
    "tower, mlp": {"recompute_tower": "selective", "recompute_modules": ("mlp",)},
    "tower": {"recompute_tower": "full"},
    "both": {"recompute": "full", "recompute_tower": "full"},
}


def kept_and_gradients() -> dict[str, tuple[int, list[torch.Tensor]]]:
    """Return the bytes of saved activations and the gradients of all trained weights for each choice."""
    from megatron_share4v.config.parallel import ParallelConfig
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.model.chunks import build_chunks
    from megatron_share4v.model.initialize import initialize_weights
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout

    results = {}
    model, batch = tiny_model(vision_from_block=1), micro_batches(0)[0]
    with open_mesh(Layout(), device=Device("cpu")) as mesh:
        for name, choice in CHOICES.items():
            options = layer_options(TrainConfig(global_batch_size=1, **choice))
            [chunk] = build_chunks(model, mesh=mesh, parallel=ParallelConfig(), dtype=torch.float32, options=options)
            initialize_weights([chunk], seed=1, model=model)
            weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
            kept: dict[int, int] = {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = chunk(batch)
            loss.backward()
            results[name] = (
                sum(kept.values()),
                [parameter.grad for parameter in chunk.parameters() if parameter.requires_grad],
            )
    return results


def test_recomputation_saves_memory_and_keeps_gradients() -> None:
    [results] = run_world(1, kept_and_gradients)
    kept = {name: size for name, (size, _) in results.items()}
    print(kept)
    assert kept["none"] > kept["attention"] > kept["attention and mlp"] > kept["full"]
    assert kept["none"] > kept["two layers"] > kept["full"] and kept["full"] < kept["none"] / 3
    assert kept["none"] > kept["tower, mlp"] > kept["tower"] and kept["both"] < kept["full"]
    # Two of eight layers.
    assert kept["none"] - kept["two layers"] == pytest.approx((kept["none"] - kept["full"]) / 4, rel=0.05)
    for name, (_, gradients) in results.items():
        assert all(torch.equal(a, b) for a, b in zip(gradients, results["none"][1], strict=True)), name


def test_unsupported_recomputation_raises() -> None:
    config = TrainConfig(global_batch_size=1, recompute="selective", recompute_modules=("layernorm",))
    with pytest.raises(ConfigError, match="only where Transformer Engine is installed"):
        layer_options(config)
    assert str(layer_options(config, has_transformer_engine=True).language) == "selective (layernorm)"
    for wrong in ({"recompute_layers": 2}, {"recompute": "selective", "recompute_modules": ()}):
        with pytest.raises(ValueError, match="recompute"):
            TrainConfig(global_batch_size=1, **wrong)
