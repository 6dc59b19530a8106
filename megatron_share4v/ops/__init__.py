"""Fused ops: one file each with its torch reference, the registry, and the build of the compiled library."""
