"""Weights & Biases; `WANDB_MODE=offline` keeps the run in its folder, for `wandb sync`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.run.trackers.base import TrackedRun


class WandB:
    """Logs to Weights & Biases; see `Tracker`.

    Logged data cannot be removed there, so a step is logged only once. `step` is the axis of all
    charts, because W&B's own counter would reject a late number.
    """

    rewinds = False

    def __init__(self, run: TrackedRun):
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project),
            name=run.name,
            id=run.identity,
            resume=None if run.identity is None else "allow",
            dir=str(run.folder),
            config=dict(run.config),
            # A changed option of a resumed run is not an error.
            allow_val_change=True,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.identity = str(self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers."""
        self._run.log({"step": step} | dict(values))

    def histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Records a histogram."""
        bins = (np.asarray(counts, np.float64), np.asarray(edges, np.float64))
        self._run.log({"step": step, name: self._wandb.Histogram(np_histogram=bins)})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records answers as a table."""
        columns = list(rows[0])
        table = self._wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._run.log({"step": step, "samples": table})

    def close(self, *, failed: bool) -> None:
        """Ends the run."""
        self._run.finish(exit_code=int(failed))
