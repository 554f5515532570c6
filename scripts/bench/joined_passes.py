"""Two models' passes as one over stacked weights, and three passes over one base as one.

    python scripts/bench/joined_passes.py [--sizes S M] [--rows 8] [--out FILE]

`apart` and `joined` are two models of one shape, such as policy and critic: two passes, or one
under `vmap` over their stacked weights. `three` and `one` are three passes over the same weights,
such as policy, reference and critic as adapters of one base, or one pass over their rows end to end
(without the adapters' own products: an upper bound). Rows of 128 tokens; all take turns in one
process; milliseconds are medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _job import machine  # noqa: E402
from _start import random_llama  # noqa: E402
from _turns import median_times  # noqa: E402

LENGTH = 128


def measure(size: str, rows: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each form."""
    model, first = random_llama(size, 0)
    second = random_llama(size, 1)[1]
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, (rows, LENGTH))
    ids = jnp.asarray(ids, jnp.int32)
    ends = jnp.concatenate([ids] * 3)

    def run(params: Any, ids: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
        return jnp.sum(jnp.square(model.apply(params, ids, positions, jnp.ones_like(ids))))

    def apart(pair: Any) -> jax.Array:
        return run(pair[0], ids) + run(pair[1], ids)

    def joined(both: Any) -> jax.Array:
        return jnp.sum(jax.vmap(run, (0, None))(both, ids))

    once = jax.jit(run)
    forms = {
        "apart": (jax.jit(apart), (first, second)),
        "joined": (jax.jit(joined), stacked),
        "apart, gradient": (jax.jit(jax.grad(apart)), (first, second)),
        "joined, gradient": (jax.jit(jax.grad(joined)), stacked),
        "three": (lambda params: [once(params, ids) for _ in range(3)], first),
        "one": (lambda params: once(params, ends), first),
    }
    runs = {name: functools.partial(form, params) for name, (form, params) in forms.items()}
    return median_times(runs, rounds)


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    found = [
        {"size": size, "rows": rows, "milliseconds": measure(size, rows, arguments.rounds)}
        for size in arguments.sizes
        for rows in arguments.rows
    ]
    print(json.dumps(found))
    if arguments.out is not None:
        record = {"benchmark": "joined_passes", "length": LENGTH, "found": found} | machine()
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
