"""Ranks and devices: who computes what, and how the ranks of one job find each other. Only torch.distributed here."""
