"""Samples: from annotation files through shards, index and plan to batches."""
