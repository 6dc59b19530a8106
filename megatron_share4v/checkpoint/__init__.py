"""Checkpoints of a run: written whole or not at all, checked before they are used, kept as long as asked for."""
