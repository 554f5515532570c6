"""The model as lm-eval sees it, under its name for users; the code is in `run.evaluation`."""

from jaxalign.run.evaluation.lm_eval_model import JaxLM

__all__ = ["JaxLM"]
