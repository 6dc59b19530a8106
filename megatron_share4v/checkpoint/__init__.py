"""Checkpoints: atomic saves with a manifest, verification, retention, and Hugging Face conversion."""
