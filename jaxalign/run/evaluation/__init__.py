"""Measures of a language model: of a saved one (`jaxalign eval`), and of a policy in training."""
