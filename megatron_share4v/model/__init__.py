"""The model: CLIP ViT tower, projector, LLaMA decoder, and their split into pipeline stages."""
