"""The network: CLIP ViT tower, projector, LLaMA, and how they are cut into pipeline stages."""
