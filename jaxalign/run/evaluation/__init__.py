"""Evaluations of a language model, saved (`jaxalign eval`) or in training."""
