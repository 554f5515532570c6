"""Attention: masks, plain XLA, kernels, the choice between them, and the KV cache."""
