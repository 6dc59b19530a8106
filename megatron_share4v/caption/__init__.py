"""Batch captioning: inputs -> captioner (our engine or an endpoint) -> answer logs -> output files."""
