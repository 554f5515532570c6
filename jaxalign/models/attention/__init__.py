"""Attention: masks, the plain form, kernels, which of them runs, and the KV cache."""
