"""Prepared data sets on disk: shards, index, sample reader, and the quarantine of samples that cannot be read."""
