"""The section `run.early_stopping`."""

from __future__ import annotations

import dataclasses

from jaxalign.run.config.data import want


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Ends a run once a held-out metric no longer improves (Prechelt 1998).

    Attributes:
      metric: name of a held-out metric, as in `metrics.jsonl`, with or without its `eval/`.
      mode: "min": lower is better; "max": higher is better.
      patience: evaluations in a row without a better value after which the run ends.
      min_delta: by how much a value must beat the best one to count as better.
    """

    metric: str
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self):
        where = "run.early_stopping"
        want(bool(self.metric), f"{where}.metric", self.metric, "the name of a held-out figure")
        want(self.mode in ("min", "max"), f"{where}.mode", self.mode, "min or max")
        want(self.patience > 0, f"{where}.patience", self.patience, "positive")
        want(self.min_delta >= 0, f"{where}.min_delta", self.min_delta, "0 or more")
