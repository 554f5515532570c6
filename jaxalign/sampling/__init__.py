"""Sampling: from prompts to answers and their log-probabilities."""
