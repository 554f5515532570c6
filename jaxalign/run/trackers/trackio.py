"""Trackio: a local database that `trackio show` serves, or a Space on the Hugging Face hub."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.run.trackers.base import TrackedRun


class Trackio:
    """Logs to Trackio; see `Tracker`. Sampled answers are traces there.

    Trackio finds a run by its name, so the name ends in a random number.
    """

    rewinds = False

    def __init__(self, run: TrackedRun):
        import trackio

        self._trackio = trackio
        self.identity = run.identity or f"{run.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", run.project),
            name=self.identity,
            config=dict(run.config),
            resume="allow",
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers."""
        self._run.log(dict(values), step=step)

    def histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Records a histogram."""
        bins = (np.asarray(counts, np.float64), np.asarray(edges, np.float64))
        self._run.log({name: self._trackio.Histogram(np_histogram=bins)}, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records answers as traces of a question and its answer."""
        traces = [
            self._trackio.Trace(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["answer"]},
                ],
                metadata={k: v for k, v in row.items() if k not in ("prompt", "answer")},
            )
            for row in rows
        ]
        self._run.log({"samples": traces}, step=step)

    def close(self, *, failed: bool) -> None:
        """Sends the remaining data."""
        self._run.finish()
