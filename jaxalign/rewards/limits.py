"""The time limit of a reward: its option `timeout`."""

from __future__ import annotations

import math

from jaxalign.data.time_limit import OutOfTime, call_within

__all__ = ["OutOfTime", "call_within", "check_timeout"]


def check_timeout(kind: str, timeout: float | None) -> None:
    """Checks the option `timeout` of a reward.

    Raises:
      ValueError: it is not a positive number of seconds.
    """
    if timeout is not None and not 0 < timeout < math.inf:
        raise ValueError(
            f"{kind} reward timeout={timeout}: wanted positive seconds, or null for no limit"
        )
