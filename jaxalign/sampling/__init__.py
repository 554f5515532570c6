"""Sampling: answers to prompts, with their log-probabilities."""
