"""Samples to micro-batches: encoding, collation, worker processes, prefetch to the device."""
