"""A mixture of experts: each token takes a few of many feed-forward networks; no token is dropped.

Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so that every
token gets exactly its experts, whatever other tokens chose. The router's choices are returned for
the load-balancing loss in `jaxalign.losses.router`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.adapters import adapter_of
from jaxalign.models.base import DecoderConfig, LoraConfig
from jaxalign.models.layers import ACTIVATIONS, INIT_STD, draw_factor
from jaxalign.models.quantized import QuantizedKernel, make_kernel
from jaxalign.parallel.shard_map import map_row_shards
from jaxalign.types import Params


class Routing(NamedTuple):
    """A router's choices for each token.

    Attributes:
      probs: float32 `[B, T, E]`, its softmax over all experts.
      chosen: float32 `[B, T, E]`, 1 for the experts taken, else 0; summed over layers, a count.
      experts: int32 `[B, T, k]`, the experts taken. None: summed over layers.
    """

    probs: jax.Array
    chosen: jax.Array
    experts: jax.Array | None = None


def expert_dtype(config: DecoderConfig) -> jnp.dtype:
    """The smallest dtype that holds the experts' indices."""
    return jnp.dtype(jnp.uint8 if config.num_experts <= 256 else jnp.uint16)


def expert_numbers(routing: Routing, config: DecoderConfig) -> jax.Array:
    """The indices of the experts that tokens took in one layer, `[B, T, k]`, in `expert_dtype`."""
    assert routing.experts is not None
    return routing.experts.astype(expert_dtype(config))


class Router(nnx.Module):
    """Scores of the experts for each token."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.num_experts)
        noise = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(INIT_STD * noise, axes="embed router")
        self.count = config.experts_per_token
        self.normalize = config.normalize_routing

    def __call__(
        self, x: jax.Array, replayed: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Routing]:
        """`[B, T, D]` → (experts int32 `[B, T, k]`, their weights `[B, T, k]`, routing).

        `replayed` experts, integers `[B, T, k]`, replace the most likely ones; their weights and
        gradients still come from the probabilities here (Ma et al. 2025,
        https://arxiv.org/abs/2510.11370, equation 4).
        """
        kernel = self.kernel[...].astype(x.dtype)
        logits = jnp.einsum("btd,de->bte", x, kernel, preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        if replayed is None:
            weights, experts = jax.lax.top_k(probs, self.count)
        else:
            experts = replayed.astype(jnp.int32)
            weights = jnp.take_along_axis(probs, experts, axis=-1)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(experts, probs.shape[-1], dtype=jnp.float32)
        return experts, weights, Routing(probs, jnp.sum(chosen, axis=2), experts)


class ExpertLinear(nnx.Module):
    """A projection of every expert, `[E, in, out]`, with adapters like `Linear`'s."""

    def __init__(
        self, rngs: nnx.Rngs, name: str, sizes: tuple[int, int, int], axes: str,
        lora: LoraConfig | None, layers: int, quantize: str | None = None,
    ):  # fmt: skip
        count, fan_in, fan_out = sizes
        in_axis, out_axis = axes.split()
        noise = jax.random.normal(rngs.params(), sizes, jnp.float32)
        self.kernel = make_kernel(INIT_STD * noise, f"expert {axes}", quantize)
        self.lora_scale = 0.0
        self.axes = axes
        adapter = adapter_of(lora, name, layers)
        if lora is None or adapter is None:
            self.lora_a = self.lora_b = None
            return
        a = draw_factor(rngs, (count, fan_in, adapter.rank), lora.init)
        b = jnp.zeros((count, adapter.rank, fan_out), jnp.float32)
        self.lora_a = nnx.Param(a / fan_in**0.5, axes=f"expert {in_axis} rank")
        self.lora_b = nnx.Param(b, axes=f"expert rank {out_axis}")
        self.lora_scale = 1.0 if adapter.scale is None else adapter.scale

    def weights(self, dtype: jnp.dtype) -> tuple[dict[str, jax.Array], dict[str, str]]:
        """The matrices for `_multiply`, and their logical axes there.

        The residual stream is not split while experts compute.
        """
        in_axis, out_axis = self.axes.replace("embed", "hidden").split()
        if isinstance(self.kernel, QuantizedKernel):
            arrays = {"kernel": self.kernel.matrix(dtype)}
        else:
            arrays = {"kernel": self.kernel[...].astype(dtype)}
        axes = {"kernel": f"expert {in_axis} {out_axis}"}
        if self.lora_a is not None and self.lora_b is not None:
            arrays["a"] = self.lora_a[...].astype(dtype)
            arrays["b"] = self.lora_b[...].astype(dtype) * self.lora_scale
            axes |= {"a": f"expert {in_axis} rank", "b": f"expert rank {out_axis}"}
        return arrays, axes


def _multiply(
    x: jax.Array, weights: dict[str, jax.Array], sizes: jax.Array, in_group: jax.Array | None
) -> jax.Array:
    """Multiplies rows `[N, in]`, sorted by expert, by their expert's matrix → `[N, out]`.

    Args:
      x: the rows.
      weights: matrices `[E, in, out]`, and adapters if any.
      sizes: int32 `[E]`, the number of rows of each expert.
      in_group: bool `[N, 1]`, which rows belong to an expert; the others give 0. None: all do.
    """

    def product(x: jax.Array, matrices: jax.Array) -> jax.Array:
        # ragged_dot may leave NaN in rows of no group, forward or backward.
        if in_group is None:
            return jax.lax.ragged_dot(x, matrices, sizes)
        out = jax.lax.ragged_dot(jnp.where(in_group, x, 0), matrices, sizes)
        return jnp.where(in_group, out, 0)

    y = product(x, weights["kernel"])
    if "a" in weights:
        y = y + product(product(x, weights["a"]), weights["b"])
    return y


class Experts(nnx.Module):
    """Router and experts in place of an MLP."""

    def __init__(
        self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs,
        quantize: str | None = None,
    ):  # fmt: skip
        count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        linear = functools.partial(
            ExpertLinear, rngs, lora=lora, layers=config.num_layers, quantize=quantize
        )
        self.quantized = quantize is not None
        self.router = Router(config, rngs)
        self.gate = linear("mlp.gate", (count, hidden, inner), "embed mlp")
        self.up = linear("mlp.up", (count, hidden, inner), "embed mlp")
        self.down = linear("mlp.down", (count, inner, hidden), "mlp embed")
        self.activation = config.activation
        self.count = count

    def __call__(
        self, x: jax.Array, replayed: jax.Array | None = None
    ) -> tuple[jax.Array, Routing]:
        """`[B, T, D]` → (`[B, T, D]`, routing); `replayed` as for the router."""
        experts, shares, routing = self.router(x, replayed)
        run = self._run
        if self.quantized:
            # The backward pass dequantises again, instead of keeping floats.
            run = jax.checkpoint(run, prevent_cse=False)
        return run(x, experts, shares), routing

    def _run(self, x: jax.Array, experts: jax.Array, shares: jax.Array) -> jax.Array:
        """Runs `_compute` on every device's rows and experts."""
        weights, axes = {}, {}
        for name, linear in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            weights[name], axes[name] = linear.weights(x.dtype)
        # Sorting mixes the tokens of all rows. On a mesh each device sorts only its own rows; if
        # experts are split over devices, it sorts the rows of all devices in its expert group.
        rows = (x, experts, shares.astype(x.dtype))
        return map_row_shards(
            self._compute, rows, weights, axes, contracted="mlp", sharded="expert"
        )

    def _compute(
        self, x: jax.Array, experts: jax.Array, shares: jax.Array, weights: Params, first: Any
    ) -> jax.Array:
        """The sum over this device's experts, from index `first` on: `[B, T, D]` → the same shape.

        Args:
          x: `[B, T, D]`.
          experts: int32 `[B, T, k]`.
          shares: `[B, T, k]`, the weight of each.
          weights: matrices of this device's experts.
          first: number of the first of them.
        """
        rows, length, width = x.shape
        per_token, local = experts.shape[-1], weights["gate"]["kernel"].shape[0]
        flat = experts.reshape(-1) - first  # [B·T·k], number among the local experts
        if local < self.count:
            # Choices of other devices' experts are sorted last, belong to no group and contribute
            # 0.
            is_local = (flat >= 0) & (flat < local)
            flat = jnp.where(is_local, flat, local)
            shares = jnp.where(is_local.reshape(shares.shape), shares, 0)
        order = jnp.argsort(flat)  # [N], N = B·T·k choices by expert
        sizes = jnp.sum(jax.nn.one_hot(flat, local, dtype=jnp.int32), axis=0)  # [E]
        tokens = jnp.take(x.reshape(-1, width), order // per_token, axis=0)  # [N, D]
        in_group = None
        if local < self.count:
            in_group = jnp.arange(flat.size)[:, None] < jnp.sum(sizes)
        gate = ACTIVATIONS[self.activation](_multiply(tokens, weights["gate"], sizes, in_group))
        inner = gate * _multiply(tokens, weights["up"], sizes, in_group)  # [N, F]
        out = _multiply(inner, weights["down"], sizes, in_group)  # [N, D]
        # Back into the order of tokens: [B, T, k, D].
        out = jnp.take(out, jnp.argsort(order), axis=0).reshape(rows, length, per_token, width)
        return jnp.sum(out * shares[..., None], axis=2)
