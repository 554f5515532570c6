"""MLflow: the server, database or folder that `MLFLOW_TRACKING_URI` names."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.run.trackers.base import TrackedRun

_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _PARAM_LENGTH = 1000, 100, 6000  # limits of its API


class MLflow:
    """Logs to MLflow; see `Tracker`.

    It has no histograms and no tables by step: they become JSON files among the run's artifacts,
    `histograms/<name>/<step>.json` and `samples/<step>.json`.
    """

    rewinds = False

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run.identity is not None:
            self.identity = run.identity
            self._client.update_run(run.identity, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        experiment = self._client.get_experiment_by_name(project)
        number = (
            self._client.create_experiment(project)
            if experiment is None
            else experiment.experiment_id
        )
        self.identity = self._client.create_run(number, run_name=run.name).info.run_id
        params = [
            Param(_name(name), str(value)[:_PARAM_LENGTH]) for name, value in run.config.items()
        ]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self.identity, params=params[start : start + _PARAMS_AT_ONCE])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers."""
        now = int(time.time() * 1000)
        metrics = [self._metric(_name(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self.identity, metrics=metrics[start : start + _METRICS_AT_ONCE])

    def histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Records a histogram as a file."""
        bins = {"edges": list(edges), "counts": list(counts)}
        self._client.log_dict(self.identity, bins, f"histograms/{_name(name)}/{step:07d}.json")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records answers as a file."""
        lines = {"samples": [dict(row) for row in rows]}
        self._client.log_dict(self.identity, lines, f"samples/{step:07d}.json")

    def close(self, *, failed: bool) -> None:
        """Ends the run."""
        self._client.set_terminated(self.identity, "FAILED" if failed else "FINISHED")


def _name(name: str) -> str:
    """A name in which code points replace characters that MLflow does not allow."""
    return re.sub(r"[^\w\-. /:]|[^\x00-\x7f]", lambda found: f"_{ord(found[0]):x}_", name)
