"""Hugging Face layouts: the weight map, import, export, verification, adapters."""
