"""Fused ops: one file each with its torch reference, op.py the record of one, registry.py the list, build.py and choose.py the compiled library."""
