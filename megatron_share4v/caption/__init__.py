"""Captions for many images: inputs -> a captioner (our engine, or an endpoint) -> journals -> files. Uses infer/, knows nothing of the server."""
