"""Adam with moments of 2 bytes (bfloat16) or 1 byte (int8) each, stochastically rounded.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   update = m̂ / (√v̂ + ε)

(Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1). The arithmetic is float32; only
the moments stored between two updates have low precision. With β₂ = 0.999, v decays by a thousandth
per update, less than half the spacing of either format: rounded to nearest, v would never decay.
Values are therefore rounded up or down at random, with probabilities that make the expectation
exact (Gupta et al. 2015, https://arxiv.org/abs/1502.02551, §3.1). The random numbers depend only on
the update's number: a resumed run rounds the same way, on any mesh.

int8 is a logarithmic form over a float32 scale s, the largest magnitude of each row (the last axis
of a parameter): block-wise quantisation with a non-linear map, as in 8-bit Adam (Dettmers et al.
2022, https://arxiv.org/abs/2110.02861, §2), with these maps:

    m = sign(c) · s · 2^((|c| − 127) / 6),   c ∈ −127 … 127      21 octaves, steps of 12 %
    v = s · 2^((c − 255) / 8),               c ∈ 0 … 255         32 octaves, steps of 9 %

c = 0 encodes zero. A v below the last octave is rounded up, so that no update is divided by too
small a number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxalign.types import Array

MOMENTS = ("float32", "bfloat16", "int8")
"""Formats of Adam's moments."""

_M_LEVELS, _M_OCTAVE = 127, 6
_V_LEVELS, _V_OCTAVE = 255, 8


class SmallMoments(NamedTuple):
    """The state between two updates.

    Attributes:
      count: updates so far, int32.
      mu, nu: m and v, shaped as the parameters: bfloat16, or the codes, int8 and uint8.
      mu_scale, nu_scale: s of each row, float32 `[…, 1]`; None for bfloat16.
    """

    count: Array
    mu: Any
    nu: Any
    mu_scale: Any = None
    nu_scale: Any = None


def row_scale_spec(path: tuple[Any, ...], spec: PartitionSpec, rank: int) -> PartitionSpec | None:
    """How int8's scales `[…, 1]` are sharded: like the parameter's rows, one scale per row.

    Args:
      path: path of a leaf in an optimizer's state.
      spec: the parameter's sharding spec.
      rank: number of the parameter's dimensions.

    Returns:
      None for any other leaf.
    """
    scales = ("mu_scale", "nu_scale")
    if not any(getattr(key, "name", None) in scales for key in path):
        return None
    return PartitionSpec(*tuple(spec)[: max(rank - 1, 0)])


def scale_by_small_adam(
    kind: str, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Like `optax.scale_by_adam`, with moments in "bfloat16" or "int8".

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in ("bfloat16", "int8"):
        raise ValueError(f"moments={kind!r}: wanted bfloat16 or int8")

    def init(params: Any) -> SmallMoments:
        count = jnp.zeros((), jnp.int32)
        if kind == "bfloat16":
            zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.bfloat16), params)
            return SmallMoments(count, zeros, jax.tree.map(jnp.copy, zeros))

        def make(dtype: Any) -> Any:
            return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), dtype), params)

        def scales() -> Any:
            return jax.tree.map(lambda p: jnp.zeros(_row(jnp.shape(p)), jnp.float32), params)

        return SmallMoments(count, make(jnp.int8), make(jnp.uint8), scales(), scales())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SmallMoments]:
        del params
        count = state.count + 1
        leaves, tree = jax.tree.flatten(updates)
        moments = [
            [None] * len(leaves) if part is None else tree.flatten_up_to(part) for part in state[1:]
        ]
        key = jax.random.fold_in(jax.random.key(0), count)
        first, second = 1 - jnp.float32(b1) ** count, 1 - jnp.float32(b2) ** count

        def update_leaf(key: Any, g: Any, mu: Any, nu: Any, mu_scale: Any, nu_scale: Any) -> Any:
            """(update, (mu, nu, mu_scale, nu_scale)) of one parameter, or of one of its layers."""
            narrow, g = g.dtype == jnp.bfloat16, g.astype(jnp.float32)
            m = b1 * _decode_m(mu, mu_scale) + (1 - b1) * g
            v = b2 * _decode_v(nu, nu_scale) + (1 - b2) * jnp.square(g)
            step = (m / first) / (jnp.sqrt(v / second) + eps)
            m_key, v_key, step_key = jax.random.split(key, 3)
            if narrow:  # for bfloat16 weights: an update takes no more memory than its gradient
                step = to_bfloat16(step_key, step)
            if kind == "bfloat16":
                return step, (to_bfloat16(m_key, m), to_bfloat16(v_key, v), None, None)
            (m_code, m_scale), (v_code, v_scale) = encode_m(m_key, m), encode_v(v_key, v)
            return step, (m_code, v_code, m_scale, v_scale)

        steps, states = [], []
        for number, leaf in enumerate(zip(leaves, *moments, strict=True)):
            leaf_key, layers = jax.random.fold_in(key, number), leaf[0].shape[:-2]
            if layers:  # layer by layer, so that only one layer's moments are float32 at a time
                keys = jax.random.split(leaf_key, layers[0])
                step, new = jax.lax.map(lambda layer: update_leaf(*layer), (keys, *leaf))
            else:
                step, new = update_leaf(leaf_key, *leaf)
            steps.append(step)
            states.append(new)
        parts = [
            None if old and old[0] is None else tree.unflatten([new[i] for new in states])
            for i, old in enumerate(moments)
        ]
        return tree.unflatten(steps), SmallMoments(count, *parts)

    return optax.GradientTransformation(init, update)


def encode_m(key: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """m → (codes int8, scales float32 `[…, 1]`); the codes' expectation is m."""
    scale, size = _scaled(m)
    code = _levels(key, size, _M_LEVELS, _M_OCTAVE, floor=0)
    return (jnp.sign(m) * code).astype(jnp.int8), scale


def encode_v(key: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """v ≥ 0 → (codes uint8, scales float32 `[…, 1]`); only 0 becomes 0."""
    scale, size = _scaled(v)
    return _levels(key, size, _V_LEVELS, _V_OCTAVE, floor=1).astype(jnp.uint8), scale


def decode_m(code: jax.Array, scale: jax.Array) -> jax.Array:
    """Codes and scales → m, float32."""
    code = code.astype(jnp.float32)
    return jnp.sign(code) * scale * _value(jnp.abs(code), _M_LEVELS, _M_OCTAVE)


def decode_v(code: jax.Array, scale: jax.Array) -> jax.Array:
    """Codes and scales → v, float32."""
    return scale * _value(code.astype(jnp.float32), _V_LEVELS, _V_OCTAVE)


def _row(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 1) if shape else ()


def _decode_m(stored: jax.Array, scale: jax.Array | None) -> jax.Array:
    return stored.astype(jnp.float32) if scale is None else decode_m(stored, scale)


def _decode_v(stored: jax.Array, scale: jax.Array | None) -> jax.Array:
    return stored.astype(jnp.float32) if scale is None else decode_v(stored, scale)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest magnitude of each row, and magnitudes as fractions of it."""
    size = jnp.abs(x)
    scale = jnp.max(size, axis=-1, keepdims=True) if x.ndim else size
    return scale, size / jnp.where(scale > 0, scale, 1.0)


def _value(code: jax.Array, levels: int, octave: int) -> jax.Array:
    return jnp.where(code > 0, jnp.exp2((code - levels) / octave), 0.0)


def _levels(key: jax.Array, part: jax.Array, levels: int, octave: int, *, floor: int) -> jax.Array:
    """Fraction of the scale, 0 to 1 → code, 0 … levels; only 0 gets a code below `floor`."""
    exact = levels + octave * jnp.log2(jnp.where(part > 0, part, 1.0))
    lower = jnp.clip(jnp.floor(exact), 0, levels - 1)
    low, high = (_value(x, levels, octave) for x in (lower, lower + 1))
    up = jax.random.uniform(key, part.shape) * (high - low) < part - low
    return jnp.where(part > 0, jnp.maximum(lower + up, floor), 0.0)


def round_weights_at_random() -> optax.GradientTransformation:
    """Stochastic rounding of bfloat16 weights; other updates pass unchanged.

    An update of 1e-6 is less than half the spacing of bfloat16 at a weight of 0.001 or more:
    rounded to nearest, the weight never moves. The sum is computed in float32 and rounded up or
    down, with probabilities that make its expectation exact. The returned update is the difference,
    which bfloat16 holds exactly. Put it last in a chain; it needs the parameters.
    """

    def narrow(leaf: Any) -> bool:
        return jnp.result_type(leaf) == jnp.bfloat16

    def init(params: Any) -> Any:
        if any(map(narrow, jax.tree.leaves(params))):
            return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if isinstance(state, optax.EmptyState):
            return updates, state
        key = jax.random.fold_in(jax.random.key(1), state.count)
        leaves, tree = jax.tree.flatten(updates)
        rounded = []
        for number, (u, p) in enumerate(zip(leaves, tree.flatten_up_to(params), strict=True)):
            if narrow(p):
                moved = p.astype(jnp.float32) + u.astype(jnp.float32)
                u = to_bfloat16(jax.random.fold_in(key, number), moved) - p
            rounded.append(u)
        return tree.unflatten(rounded), optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def to_bfloat16(key: jax.Array, x: jax.Array) -> jax.Array:
    """float32 → bfloat16, rounded up or down at random; the expectation is x.

    A random number is added to the 16 bits that will be cut off; a carry rounds up. Values that
    bfloat16 holds exactly are unchanged.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (bits + noise) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
