"""The rate of a float32 matrix product in each library of this interpreter: python _rates.py

Prints one JSON object, library → GFLOP/s: the best of some products of 2048 × 2048 matrices in
numpy, torch and XLA, those that are installed.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

SIZE, TRIES = 2048, 6


def gflops(product: Callable[[], Any]) -> float:
    """The best rate of several calls."""
    product()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return round(2e-9 * SIZE**3 / min(seconds), 1)


def rates() -> dict[str, float]:
    """Library → GFLOP/s."""
    import numpy as np

    matrix = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
    found = {"numpy": gflops(lambda: matrix @ matrix)}
    if importlib.util.find_spec("torch"):
        import torch

        tensor = torch.from_numpy(matrix)
        found["torch"] = gflops(lambda: tensor @ tensor)
    if importlib.util.find_spec("jax"):
        import jax

        array, product = jax.numpy.asarray(matrix), jax.jit(lambda a: a @ a)
        found["xla"] = gflops(lambda: jax.block_until_ready(product(array)))
    return found


if __name__ == "__main__":
    print(json.dumps(rates()))
