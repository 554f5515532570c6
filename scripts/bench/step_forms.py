"""Other forms of a training step's parts: are they faster?

    python scripts/bench/step_forms.py [--sizes S M] [--rounds 25] [--out FILE]

- `norm`: RMSNorm and the gate's and up's projections, forward and backward: the norm's scale on x
  (as it is), or folded into the weights, with the row's factor after the product.
- `swiglu`: an MLP, forward and backward: silu(gate) · up by JAX's rules (as it is), with a backward
  pass of its own that keeps gate and up alone, or with the same by `jax.checkpoint`.
- `adam`: AdamW's update of all weights, array by array (as it is); of one flat vector; of one flat
  vector with the gradients joined first.

1,024 tokens; the forms of a part take turns in one process; milliseconds are medians.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from _job import machine  # noqa: E402
from _start import random_llama, shape_of  # noqa: E402
from _turns import median_times  # noqa: E402

TOKENS = 1024

Forms = dict[str, Callable[[], Any]]
"""Form → runs it once."""


def gradients(function: Callable[..., jax.Array], *args: jax.Array) -> Callable[[], Any]:
    """Runs a function and the gradients of a sum of its results' squares."""

    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(function(*args)))

    step = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(args)))))
    return lambda: step(*args)


def norm_forms(hidden: int, inner: int) -> Forms:
    """RMSNorm and projections to gate and up, `[T, D]` → `[T, 2F]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (TOKENS, hidden))
    scale = 1 + 0.1 * jax.random.normal(keys[1], (hidden,))
    kernel = jax.random.normal(keys[2], (hidden, 2 * inner)) / hidden**0.5

    def factor(x: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    def apart(x: jax.Array, scale: jax.Array, kernel: jax.Array) -> jax.Array:
        return (x * factor(x) * scale) @ kernel

    def folded(x: jax.Array, scale: jax.Array, kernel: jax.Array) -> jax.Array:
        return (x @ (scale[:, None] * kernel)) * factor(x)

    return {f.__name__: gradients(f, x, scale, kernel) for f in (apart, folded)}


@jax.custom_vjp
def _own_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    return _own_swiglu(gate, up), (gate, up)


def _swiglu_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = kept
    share = jax.nn.sigmoid(gate)
    act = gate * share
    return dy * up * (share + act * (1 - share)), dy * act


_own_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def swiglu_forms(hidden: int, inner: int) -> Forms:
    """An MLP `[T, D]` → `[T, D]`."""
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (TOKENS, hidden))
    gate, up, down = (
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(
            keys[1:], ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True
        )
    )

    def plain(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    def own(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return _own_swiglu(x @ gate, x @ up) @ down

    def recomputed(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        act = jax.checkpoint(lambda gate, up: jax.nn.silu(gate) * up)
        return act(x @ gate, x @ up) @ down

    return {f.__name__: gradients(f, x, gate, up, down) for f in (plain, own, recomputed)}


def adam_forms(size: str) -> Forms:
    """AdamW's update of a model."""
    params = random_llama(size)[1]
    leaves = jax.tree.leaves(params)
    tx = optax.adamw(1e-4)

    def join(arrays: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([x.ravel() for x in arrays])

    def update(state: Any, grads: Any) -> Any:
        params, inner = state
        updates, inner = tx.update(grads, inner, params)
        return optax.apply_updates(params, updates), inner

    def repeated(step: Callable[..., Any], params: Any, grads: Any) -> Callable[[], Any]:
        params = jax.tree.map(jnp.copy, params)
        held = [(params, tx.init(params))]
        step = jax.jit(step, donate_argnums=0)

        def run() -> Any:
            held[0] = step(held[0], grads)
            return held[0]

        return run

    whole = join(leaves)
    return {
        "arrays": repeated(update, params, jax.tree.map(jnp.copy, params)),
        "flat": repeated(update, whole, jnp.copy(whole)),
        "flat, joined": repeated(lambda s, g: update(s, join(g)), whole, leaves),
    }


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    found = {}
    for size in arguments.sizes:
        shape = shape_of(size)
        width = (shape.hidden_size, shape.intermediate_size)
        parts = {
            "norm": norm_forms(*width), "swiglu": swiglu_forms(*width), "adam": adam_forms(size)
        }  # fmt: skip
        found[size] = {part: median_times(forms, arguments.rounds) for part, forms in parts.items()}
    print(json.dumps(found))
    if arguments.out is not None:
        record = {"benchmark": "step_forms", "tokens": TOKENS, "milliseconds": found} | machine()
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
