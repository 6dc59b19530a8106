"""megatron_share4v: train ShareGPT4V-style multimodal models on megatron-core."""

__version__ = "0.1.0"
