"""The model: ViT tower, projector, decoder, and their split into pipeline stages."""
