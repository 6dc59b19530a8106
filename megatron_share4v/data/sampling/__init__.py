"""Sample order, blending, packing, and the sampler that combines them: pure arithmetic, no I/O."""
