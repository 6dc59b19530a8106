"""The layout of ranks, the device of a rank, and process groups; everything here builds on torch.distributed alone."""
