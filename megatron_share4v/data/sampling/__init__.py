"""Which samples each step trains on: orders, blending, packing, and the sampler that combines them. Pure arithmetic."""
