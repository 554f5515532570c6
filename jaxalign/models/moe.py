"""A mixture of experts: each token takes a few of many feed-forward networks, none is dropped.

Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so that every
token gets exactly its experts whatever the others chose. What the router chose is returned, for
the load-balancing loss in `jaxalign.losses.router`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.base import DecoderConfig, LoraConfig
from jaxalign.models.layers import ACTIVATIONS, INIT_STD
from jaxalign.parallel.shard_map import map_row_shards
from jaxalign.types import Params


class Routing(NamedTuple):
    """What a router did with each token.

    Attributes:
      probs: float32 `[B, T, E]`, its softmax over all experts.
      chosen: float32 `[B, T, E]`, 1 for the experts taken (0 or 1 for one layer; summed over layers
        a count).
    """

    probs: jax.Array
    chosen: jax.Array


class Router(nnx.Module):
    """Scores of the experts for each token."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.num_experts)
        noise = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(INIT_STD * noise, axes="embed router")
        self.count = config.experts_per_token
        self.normalize = config.normalize_routing

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
        """`[B, T, D]` → (experts int32 `[B, T, k]`, their weights `[B, T, k]`, what it did)."""
        kernel = self.kernel[...].astype(x.dtype)
        logits = jnp.einsum("btd,de->bte", x, kernel, preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(probs, self.count)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(experts, probs.shape[-1], dtype=jnp.float32)
        return experts, weights, Routing(probs, jnp.sum(chosen, axis=2))


class ExpertLinear(nnx.Module):
    """A projection of every expert, `[E, in, out]`, with adapters like `Linear`'s."""

    def __init__(
        self, rngs: nnx.Rngs, name: str, sizes: tuple[int, int, int], axes: str,
        lora: LoraConfig | None,
    ):  # fmt: skip
        count, fan_in, fan_out = sizes
        in_axis, out_axis = axes.split()
        noise = jax.random.normal(rngs.params(), sizes, jnp.float32)
        self.kernel = nnx.Param(INIT_STD * noise, axes=f"expert {axes}")
        self.lora_scale = 0.0
        self.axes = axes
        if lora is None or name not in lora.targets:
            self.lora_a = self.lora_b = None
            return
        a = jax.random.normal(rngs.params(), (count, fan_in, lora.rank), jnp.float32)
        b = jnp.zeros((count, lora.rank, fan_out), jnp.float32)
        self.lora_a = nnx.Param(a / fan_in**0.5, axes=f"expert {in_axis} rank")
        self.lora_b = nnx.Param(b, axes=f"expert rank {out_axis}")
        self.lora_scale = lora.alpha / lora.rank

    def weights(self, dtype: jnp.dtype) -> tuple[dict[str, jax.Array], dict[str, str]]:
        """The matrices as `multiply` takes them, and the axes they are to be laid out by there.

        The residual stream is whole on every device while experts compute.
        """
        in_axis, out_axis = self.axes.replace("embed", "hidden").split()
        arrays = {"kernel": self.kernel[...].astype(dtype)}
        axes = {"kernel": f"expert {in_axis} {out_axis}"}
        if self.lora_a is not None and self.lora_b is not None:
            arrays["a"] = self.lora_a[...].astype(dtype)
            arrays["b"] = self.lora_b[...].astype(dtype) * self.lora_scale
            axes |= {"a": f"expert {in_axis} rank", "b": f"expert rank {out_axis}"}
        return arrays, axes


def _multiply(
    x: jax.Array, weights: dict[str, jax.Array], sizes: jax.Array, taken: jax.Array | None
) -> jax.Array:
    """Rows `[N, in]`, sorted by expert, times each one's matrix → `[N, out]`.

    Args:
      x: the rows.
      weights: matrices `[E, in, out]`, and adapters if there are any.
      sizes: int32 `[E]`, rows of each expert.
      taken: bool `[N, 1]`, which rows belong to an expert; the others give 0. None: all do.
    """

    def product(x: jax.Array, matrices: jax.Array) -> jax.Array:
        # What a product leaves in rows of no expert, forward or backward, is not for sure a number.
        if taken is None:
            return jax.lax.ragged_dot(x, matrices, sizes)
        out = jax.lax.ragged_dot(jnp.where(taken, x, 0), matrices, sizes)
        return jnp.where(taken, out, 0)

    y = product(x, weights["kernel"])
    if "a" in weights:
        y = y + product(product(x, weights["a"]), weights["b"])
    return y


class Experts(nnx.Module):
    """Router and experts in the place of an MLP."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.router = Router(config, rngs)
        self.gate = ExpertLinear(rngs, "gate", (count, hidden, inner), "embed mlp", lora)
        self.up = ExpertLinear(rngs, "up", (count, hidden, inner), "embed mlp", lora)
        self.down = ExpertLinear(rngs, "down", (count, inner, hidden), "mlp embed", lora)
        self.activation = config.activation
        self.count = count

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """`[B, T, D]` → (`[B, T, D]`, what the router did)."""
        experts, shares, routing = self.router(x)
        weights, axes = {}, {}
        for name, linear in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            weights[name], axes[name] = linear.weights(x.dtype)
        # Sorting mixes the tokens of all rows: on a mesh each device sorts its own rows only, or
        # those of the devices that hold the other experts too.
        given = (x, experts, shares.astype(x.dtype))
        out = map_row_shards(
            self._compute, given, weights, axes, contracted="mlp", sharded="expert"
        )
        return out, routing

    def _compute(
        self, x: jax.Array, experts: jax.Array, shares: jax.Array, weights: Params, first: Any
    ) -> jax.Array:
        """What the experts that are here, from number `first` on, add to each token."""
        rows, length, width = x.shape
        each = experts.shape[-1]
        here = weights["gate"]["kernel"].shape[0]
        flat = experts.reshape(-1) - first
        if here < self.count:
            # Choices of experts elsewhere are sorted last, belong to no group and count 0.
            mine = (flat >= 0) & (flat < here)
            flat = jnp.where(mine, flat, here)
            shares = jnp.where(mine.reshape(shares.shape), shares, 0)
        order = jnp.argsort(flat)
        sizes = jnp.sum(jax.nn.one_hot(flat, here, dtype=jnp.int32), axis=0)
        given = jnp.take(x.reshape(-1, width), order // each, axis=0)
        taken = None
        if here < self.count:
            taken = jnp.arange(flat.size)[:, None] < jnp.sum(sizes)
        gate = ACTIVATIONS[self.activation](_multiply(given, weights["gate"], sizes, taken))
        inner = gate * _multiply(given, weights["up"], sizes, taken)
        out = _multiply(inner, weights["down"], sizes, taken)
        out = jnp.take(out, jnp.argsort(order), axis=0).reshape(rows, length, each, width)
        return jnp.sum(out * shares[..., None], axis=2)
