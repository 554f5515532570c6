"""Range checks of options: skipped if the value is a tracer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def outside(value: Any, valid: Callable[[Any], Any]) -> bool:
    """Whether a value is known to be out of range.

    Under `jit`, `grad` or `vmap` over an option its value is a tracer, which no Python test can
    read. Such an option compiles once for all of its values.
    """
    return not isinstance(value, jax.core.Tracer) and not valid(value)
