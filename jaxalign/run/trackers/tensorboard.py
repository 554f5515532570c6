"""TensorBoard: event files in `tensorboard/` of the run's folder, written by tensorboardX."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.run.trackers.base import TrackedRun

FOLDER = "tensorboard"


class TensorBoard:
    """Writes event files; see `Tracker`.

    A resumed run writes another file. It begins with the step from which TensorBoard ignores the
    earlier files.
    """

    identity = FOLDER
    rewinds = True

    def __init__(self, run: TrackedRun):
        from tensorboardX import SummaryWriter

        continues = run.identity is not None
        # Step 0 has the held-out metrics before the first update, which are measured again.
        purge = run.done + 1 if run.done else 0
        self._writer = SummaryWriter(
            str(run.folder / FOLDER),
            purge_step=purge if continues else None,
            # File names have a resolution of one second; a second file would replace the first.
            filename_suffix=f".{time.time_ns()}",
        )
        if not continues:
            lines = (f"    {name}: {value}" for name, value in run.config.items())
            self._writer.add_text("config", "\n".join(lines), 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Records a histogram; its mean and variance are computed from the bins' centres."""
        bounds, numbers = np.asarray(edges, np.float64), np.asarray(counts, np.float64)
        middles = (bounds[1:] + bounds[:-1]) / 2
        self._writer.add_histogram_raw(
            name,
            min=bounds[0],
            max=bounds[-1],
            num=numbers.sum(),
            sum=numbers @ middles,
            sum_squares=numbers @ middles**2,
            bucket_limits=bounds[1:].tolist(),
            bucket_counts=numbers.tolist(),
            global_step=step,
        )

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records answers as text."""
        self._writer.add_text("samples", "\n\n---\n\n".join(map(_markdown, rows)), step)

    def close(self, *, failed: bool) -> None:
        """Writes the remaining data."""
        self._writer.close()


def _markdown(row: Mapping[str, Any]) -> str:
    """A sample, with its texts indented so that Markdown shows them as they are."""
    figures = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("prompt", "answer"))
    prompt, answer = (
        "\n".join(f"    {line}" for line in str(row[name]).split("\n"))
        for name in ("prompt", "answer")
    )
    return f"{figures}\n\nprompt:\n\n{prompt}\n\nanswer:\n\n{answer}"
