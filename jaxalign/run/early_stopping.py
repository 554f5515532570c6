"""Early stopping: whether a held-out metric still improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.run.config.early_stopping import EarlyStopping


class EarlyStopper:
    """Tracks one held-out metric over evaluations.

    Args:
      config: the metric, and how long to wait; None: the run never ends early.
      state: from an earlier start, to continue from.
    """

    def __init__(self, config: EarlyStopping | None, state: Mapping[str, Any] | None = None):
        self._config = config
        state = {} if state is None else state
        self._best: float | None = state.get("best")
        self._best_step: int = state.get("step", 0)
        self._waited: int = state.get("waited", 0)

    @property
    def ends(self) -> bool:
        """Whether the run should end."""
        return self._config is not None and self._waited >= self._config.patience

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Records the metrics of an evaluation; NaN counts as no improvement.

        Raises:
          ValueError: the figure is not among them.
        """
        config = self._config
        if config is None:
            return
        name = config.metric.removeprefix("eval/")
        if name not in figures:
            raise ValueError(
                f"run.early_stopping.metric={config.metric!r}: wanted one of the held-out figures "
                f"{', '.join(sorted(figures))}"
            )
        gain = 0.0 if self._best is None else self._best - figures[name]
        gain = -gain if config.mode == "max" else gain
        first = self._best is None and figures[name] == figures[name]
        if first or gain > config.min_delta:
            self._best, self._best_step, self._waited = figures[name], step, 0
        else:
            self._waited += 1

    def state(self) -> dict[str, Any]:
        """Its state, for a checkpoint."""
        return {"best": self._best, "step": self._best_step, "waited": self._waited}

    def message(self) -> str:
        """Why the run ends."""
        config = self._config
        assert config is not None
        return (
            f"{config.metric} has not been better than {self._best} (step {self._best_step}) in "
            f"{self._waited} evaluations: the run ends here (run.early_stopping)"
        )
