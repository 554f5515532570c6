"""Tasks of lm-eval, under their name for users; the code is in `run.evaluation`."""

from jaxalign.run.evaluation.harness import check_harness, measure_tasks

__all__ = ["check_harness", "measure_tasks"]
