"""The CLIP ViT tower: uint8 pixels to patch features of the selected layer; later layers are not built.

Radford et al. 2021 (CLIP); Hugging Face `CLIPVisionModel` names.

N: images of X x X pixels; P: patches per image; V: tower width.
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
    """CLIP's patch convolution as one matrix product over normalized patches. Its weight is that of a Conv2d."""

    def __init__(self, config: LayerConfig, *, vision: VisionConfig) -> None:
        super().__init__()
        self.patch, self.ops = vision.patch_size, config.ops
        self.weight = nn.Parameter(
            torch.empty(vision.hidden_size, 3, self.patch, self.patch, dtype=config.params_dtype)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, X, X, 3] uint8 -> [N, P, V]."""
        table = normalised_values(pixels.device, self.weight.dtype)
        patches = patchify(pixels, table=table, patch=self.patch, implementation=self.ops)
        return F.linear(patches, self.weight.flatten(1))


class VisionTower(MegatronModule):
    """Class token and patches through pre-LayerNorm blocks; the class token is dropped at the end."""

    def __init__(self, config: LayerConfig, *, vision: VisionConfig, mesh: Mesh, spec: ModuleSpec) -> None:
        """Build the tower from blocks of `spec` (mcore/layer_specs.py)."""
        super().__init__(config)
        width, dtype = vision.hidden_size, config.params_dtype
        self.patch_embedding = PatchEmbedding(config, vision=vision)
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position_embedding = nn.Parameter(torch.empty(vision.num_patches + 1, width, dtype=dtype))
        self.pre_layernorm = Norm(config, width, eps=vision.layer_norm_eps)
        self.layers = LayerList(
            build_module(spec, config=config, layer_number=number, pg_collection=mesh.groups)
            for number in range(1, vision.num_built_layers + 1)
        )

    def stem(self) -> list[nn.Parameter]:
        """Parameters before the first block."""
        return [
            *self.patch_embedding.parameters(),
            self.class_embedding,
            self.position_embedding,
            *self.pre_layernorm.parameters(),
        ]

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
        """[N, X, X, 3] uint8 -> [P, N, V] features."""
        frozen = self.num_frozen_blocks()
        prefix_is_frozen = frozen > 0 or not any(parameter.requires_grad for parameter in self.stem())
        # The frozen prefix keeps no activations.
        with torch.no_grad() if prefix_is_frozen else contextlib.nullcontext():
            hidden = self._embed(pixels)
            for layer in self.layers[:frozen]:
                hidden, _ = layer(hidden_states=hidden, attention_mask=None)
        for layer in self.layers[frozen:]:
            hidden = self._run_trained_block(layer, hidden)
        return hidden[1:]

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
        patches = self.patch_embedding(pixels).transpose(0, 1)
        class_token = self.class_embedding.expand(1, patches.size(1), -1)
        return self.pre_layernorm(torch.cat([class_token, patches]) + self.position_embedding.unsqueeze(1))
