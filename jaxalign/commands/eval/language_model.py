"""The measured model, under its name for users; the code is in `run.evaluation`."""

from jaxalign.run.evaluation.language_model import EvalOptions, EvaluatedModel, Sampled

__all__ = ["EvalOptions", "EvaluatedModel", "Sampled"]
