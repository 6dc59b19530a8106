"""Fused ops: one file each with its torch reference, op.py the record of one, registry.py the list, build.py and backend.py the compiled library."""
