"""The CLIP ViT tower: pixels in, patch features of the selected layer out. Nothing after that layer is built.

N images of C channels, H x H pixels; P patches; V tower width. Radford et al. 2021 (CLIP); Hugging Face `CLIPVisionModel` names.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from megatron_share4v.config.model import VisionConfig
from megatron_share4v.mcore.groups import Mesh
from megatron_share4v.mcore.layers import LayerList, MegatronModule, TransformerConfig, build_module
from megatron_share4v.mcore.specs import Norm, layer_spec


class VisionTower(MegatronModule):
    """Class token and patches through pre-LayerNorm blocks; the class token is dropped at the end."""

    def __init__(self, config: TransformerConfig, *, vision: VisionConfig, mesh: Mesh) -> None:
        super().__init__(config)
        width, dtype = vision.hidden_size, config.params_dtype
        self.patch_embedding = nn.Conv2d(3, width, vision.patch_size, stride=vision.patch_size, bias=False, dtype=dtype)
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position_embedding = nn.Parameter(torch.empty(vision.num_patches + 1, width, dtype=dtype))
        self.pre_layernorm = Norm(config, width, eps=vision.layer_norm_eps)
        spec = layer_spec(causal=False)
        self.layers = LayerList(
            build_module(spec, config=config, layer_number=number, pg_collection=mesh.groups) for number in range(1, vision.num_built_layers + 1)
        )

    def stem(self) -> list[nn.Parameter]:
        """Parameters before the first block."""
        return [*self.patch_embedding.parameters(), self.class_embedding, self.position_embedding, *self.pre_layernorm.parameters()]

    def num_frozen_blocks(self) -> int:
        """Leading blocks (with the stem) in which nothing trains; 0 also when the stem trains."""
        if any(parameter.requires_grad for parameter in self.stem()):
            return 0
        frozen = 0
        while frozen < len(self.layers) and not any(parameter.requires_grad for parameter in self.layers[frozen].parameters()):
            frozen += 1
        return frozen

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, C, H, H] normalised pixels -> [P, N, V] features."""
        frozen = self.num_frozen_blocks()
        prefix_is_frozen = frozen > 0 or not any(parameter.requires_grad for parameter in self.stem())
        # The frozen prefix keeps no activations.
        with torch.no_grad() if prefix_is_frozen else contextlib.nullcontext():
            hidden = self._embed(pixels)
            for layer in self.layers[:frozen]:
                hidden, _ = layer(hidden_states=hidden, attention_mask=None)
        for layer in self.layers[frozen:]:
            hidden, _ = layer(hidden_states=hidden, attention_mask=None)
        return hidden[1:]

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).permute(2, 0, 1)
        class_token = self.class_embedding.expand(1, patches.size(1), -1)
        return self.pre_layernorm(torch.cat([class_token, patches]) + self.position_embedding.unsqueeze(1))
