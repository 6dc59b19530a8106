"""Benchmarks: questions in, scores out."""
