"""Image decoding and preprocessing: the policy, one decoder per backend, and the parity check between them."""
