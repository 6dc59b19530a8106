"""All tolerances of the tests, with reasons. Numbers that are not here are compared exactly."""

FP32_MODULE = 1e-5
"""Largest difference from a Hugging Face module, relative to the largest value of the reference: fp32 sums of up to a
few hundred terms in another order (fused query-key-value, tensor-parallel partial sums, another attention kernel)
differ by a few units of 2**-24 each, and six layers multiply that by about ten.
"""

FP32_GRADIENT = 1e-4
"""Same as FP32_MODULE, of a gradient of one tensor relative to its own largest value: sums over all positions, through
the layers twice.
"""

LAYOUT_LOSS = 2e-6
"""Absolute, on losses near 4.6 after up to 5 updates: a few fp32 roundings of the summed loss (2**-24 x 4.6 = 3e-7)."""

LAYOUT_NORM = 5e-6
"""Relative, of the gradient norm: partial sums over TP and DP ranks are added in another order."""

LAYOUT_WEIGHT = 5e-5
"""Absolute, after 5 updates of AdamW with learning rate 1e-3: where a gradient is near zero its rounding decides the
first update, whose size is the learning rate whatever the gradient's.
"""

BF16_LOSS = 5e-2
"""Absolute: weights and activations have 8 significant bits; sums over 32 channels and 8 layers on losses near 4.6."""

RESUME_OTHER_LAYOUT_LOSS = 1e-4
"""Absolute, over five updates after a resume at another layout: rounding of the layouts, through AdamW with learning
rate 1e-3.
"""

GOLDEN_LOSS = 5e-6
"""Absolute: the vector width of another processor changes the order of fp32 sums, as another layout does (LAYOUT_LOSS),
through five updates.
"""

PACKED_LOSS = 1e-6
"""Absolute, on losses near 4.6: a pack's rows go through matrix products of another shape, with another order of fp32
sums.
"""

PACKED_GRADIENT = 1e-6
"""Absolute, on gradients up to about 0.1: the same samples, summed over positions in another order."""

FP32_CURVE = 5e-6
"""Absolute, on each of 32 losses from 6.6 to 0.5 of the shortened quickstart: some fp32 roundings of a loss (2**-24 x
6.6 = 4e-7). Smaller micro-batches of the same global batches, another order of the same sums, move the curve by 4e-7
to 8e-7.
"""

BF16_CURVE = 5e-2
"""Same as FP32_CURVE in bf16 (8 significant bits): other micro-batches move a loss by up to 1.4e-2, most where the
curve is steepest.
"""

LAYOUT_LOGPROB = 1e-4
"""Absolute, of log-probabilities from logits up to about 10 at another TP size, where partial sums are added in another
order through 8 layers with large weights.
"""

FP8_CURVE = 5e-2
"""Absolute distance from the bf16 losses, means of 4 steps, over 80 steps in which a tiny model goes from 4.6 to 1.2 on
the same batches: factors of FP8 products are 2 % off (2**-4 / sqrt(3) at most), which changes the path but not the
slope. Measured: up to 0.011 for the default, 0.029 among the variants.
"""

FP8_LAYOUT_LOSS = 0.03
"""Absolute, on losses from 4.6 in the first 8 steps: other scales of sharded weights, on top of the difference of bf16.
"""
