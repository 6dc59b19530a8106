"""ViT tower: uint8 pixels to features of the selected layers; layers after the last of them are not built.

Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), Oquab et al. 2023 (DINOv2); the fields of VisionConfig tell them
apart.

N: images of X x X pixels; P: patches per image; V: tower width; Q: positions in the tower; F: features of an image; L:
selected layers.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_share4v.config.model import VisionConfig
from megatron_share4v.data.images.pixels import normalised_values
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layer_config import LayerConfig
from megatron_share4v.mcore.layer_specs import Norm
from megatron_share4v.mcore.layers import LayerList, MegatronModule, ModuleSpec, build_module
from megatron_share4v.ops.patchify import patchify


class PatchEmbedding(nn.Module):
    """Patch convolution as one matrix product over normalized patches. Its weight is that of a Conv2d."""

    def __init__(self, config: LayerConfig, *, vision: VisionConfig) -> None:
        super().__init__()
        self.vision, self.ops = vision, config.ops
        width, patch, dtype = vision.hidden_size, vision.patch_size, config.params_dtype
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype)) if vision.patch_bias else None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, X, X, 3] uint8 -> [N, P, V]."""
        table = normalised_values(self.vision, device=pixels.device, dtype=self.weight.dtype)
        patches = patchify(pixels, table=table, patch=self.vision.patch_size, implementation=self.ops)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class VisionTower(MegatronModule):
    """Patches, after a class token if there is one, through pre-norm blocks."""

    def __init__(self, config: LayerConfig, *, vision: VisionConfig, mesh: Mesh, spec: ModuleSpec) -> None:
        """Build the tower from blocks of `spec` (mcore/layer_specs.py)."""
        super().__init__(config)
        self.vision = vision
        width, dtype = vision.hidden_size, config.params_dtype
        self.patch_embedding = PatchEmbedding(config, vision=vision)
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype)) if vision.class_token else None
        self.position_embedding = nn.Parameter(torch.empty(vision.num_positions, width, dtype=dtype))
        self.pre_layernorm = Norm(config, width, eps=vision.layer_norm_eps) if vision.pre_norm else None
        self.layers = LayerList(
            build_module(spec, config=config, layer_number=number, pg_collection=mesh.groups)
            for number in range(1, vision.num_built_layers + 1)
        )

    def stem(self) -> list[nn.Parameter]:
        """Parameters before the first block."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("layers.")]

    def num_frozen_blocks(self) -> int:
        """Number of leading blocks in which nothing trains; 0 also when the stem trains."""
        if any(parameter.requires_grad for parameter in self.stem()):
            return 0
        frozen = 0
        while frozen < len(self.layers) and not any(
            parameter.requires_grad for parameter in self.layers[frozen].parameters()
        ):
            frozen += 1
        return frozen

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, X, X, 3] uint8 -> [F, N, L * V] features."""
        frozen = self.num_frozen_blocks()
        prefix_is_frozen = frozen > 0 or not any(parameter.requires_grad for parameter in self.stem())
        # By number of blocks passed; only what is selected is kept.
        selected: dict[int, torch.Tensor] = {}

        def select(number: int, hidden: torch.Tensor) -> torch.Tensor:
            if number in self.vision.feature_layers:
                selected[number] = hidden
            return hidden

        # The frozen prefix keeps no activations.
        with torch.no_grad() if prefix_is_frozen else contextlib.nullcontext():
            hidden = select(0, self._embed(pixels))
            for number, layer in enumerate(self.layers[:frozen], start=1):
                hidden = select(number, layer(hidden_states=hidden, attention_mask=None)[0])
        for number, layer in enumerate(self.layers[frozen:], start=frozen + 1):
            hidden = select(number, self._run_trained_block(layer, hidden))
        features = [selected[number] for number in self.vision.feature_layers]
        joined = features[0] if len(features) == 1 else torch.cat(features, dim=-1)
        return joined[self.vision.num_positions - self.vision.num_features :]

    def _run_trained_block(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run one block, with full recomputation when configured.

        Core recomputes whole layers only inside its TransformerBlock, and needs an input with a gradient, which the
        first trained block does not have.
        """

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return layer(hidden_states=hidden, attention_mask=None)[0]

        if self.config.recompute_granularity == "full" and torch.is_grad_enabled():
            return checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
        return run(hidden)

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, X, X, 3] uint8 -> [Q, N, V], the input of the first block."""
        hidden = self.patch_embedding(pixels).transpose(0, 1)
        if self.class_embedding is not None:
            hidden = torch.cat([self.class_embedding.expand(1, hidden.size(1), -1), hidden])
        hidden = hidden + self.position_embedding.unsqueeze(1)
        return hidden if self.pre_layernorm is None else self.pre_layernorm(hidden)
