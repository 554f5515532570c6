"""The parts of a block: projections, norms, attention, the feed-forward network."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.adapters import adapter_of, column_lengths, length_factor
from jaxalign.models.base import DecoderConfig, LoraConfig
from jaxalign.models.ops import project, take_columns, widen
from jaxalign.models.quantized import QuantizedKernel, make_kernel
from jaxalign.models.rope import Rope, rotate

INIT_STD = 0.02

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Linear(nnx.Module):
    """`x @ kernel (+ bias) (+ s · (x @ lora_a) @ lora_b)` in the dtype of x.

    With DoRA the columns of kernel + s · lora_a @ lora_b are scaled to the norms `lora_m`.

    Args:
      rngs: generators of the initial values.
      name: the name in a block, such as "attention.query".
      sizes: (in, out).
      axes: the kernel's two logical axes.
      bias: whether to add a bias.
      lora: options of adapters.
      layers: number of blocks.
      quantize: the kernel's quantisation, see `jaxalign.models.quantized`; None: floats.
    """

    def __init__(
        self, rngs: nnx.Rngs, name: str, sizes: tuple[int, int], axes: str, *, bias: bool,
        lora: LoraConfig | None, layers: int, quantize: str | None = None,
    ):  # fmt: skip
        fan_in, fan_out = sizes
        in_axis, out_axis = axes.split()
        self.axes = axes
        noise = jax.random.normal(rngs.params(), sizes, jnp.float32)
        self.kernel = make_kernel(INIT_STD * noise, axes, quantize)
        # The output projection's output axis is the residual stream, which is not split.
        bias_axis = "norm" if out_axis == "embed" else out_axis
        self.bias = nnx.Param(jnp.zeros(fan_out, jnp.float32), axes=bias_axis) if bias else None
        self.lora_scale = 0.0
        adapter = adapter_of(lora, name, layers)
        if lora is None or adapter is None:
            self.lora_a = self.lora_b = self.lora_m = None
            return
        # One factor is zero, so that the adapted model initially equals the base (Hu et al. 2021).
        a = draw_factor(rngs, (fan_in, adapter.rank), lora.init) / fan_in**0.5
        b = jnp.zeros((adapter.rank, fan_out), jnp.float32)
        self.lora_a = nnx.Param(a, axes=f"{in_axis} rank")
        self.lora_b = nnx.Param(b, axes=f"rank {out_axis}")
        self.lora_m = (
            nnx.Param(column_lengths(self._matrix()), axes=bias_axis) if lora.dora else None
        )
        # If the scale differs between layers, `with_layer_scales` scales B before the scan.
        self.lora_scale = 1.0 if adapter.scale is None else adapter.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, in]` → `[B, T, out]`."""
        if isinstance(self.kernel, QuantizedKernel):
            y = self.kernel.project(x)
        else:
            y = project(x, self.kernel[...].astype(x.dtype), self.axes)
        if self.lora_m is not None:
            y = (y + self._delta(x)) * self._factor()[None, None].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, None]
        if self.lora_a is not None and self.lora_m is None:
            y = y + self._delta(x)
        return y

    def _delta(self, x: jax.Array) -> jax.Array:
        assert self.lora_a is not None
        assert self.lora_b is not None
        down = self.lora_scale * (x @ self.lora_a[...].astype(x.dtype))  # [B, T, r]
        return widen(down, self.lora_b[...].astype(x.dtype))

    def _factor(self) -> jax.Array:
        """DoRA's factor of each column, float32 `[out]`."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        assert self.lora_m is not None
        whole = self._matrix() + self.lora_scale * (self.lora_a[...] @ self.lora_b[...])
        return length_factor(whole, self.lora_m[...])

    def _matrix(self) -> jax.Array:
        """The kernel in floats, `[in, out]`."""
        if isinstance(self.kernel, QuantizedKernel):
            return self.kernel.matrix()
        return self.kernel[...]


def draw_factor(rngs: nnx.Rngs, shape: tuple[int, ...], init: str) -> jax.Array:
    """√in · A of new adapters: normal, or with "peft" uniform within ±1 (He et al. 2015)."""
    if init == "peft":
        return jax.random.uniform(rngs.params(), shape, jnp.float32, -1, 1)
    return jax.random.normal(rngs.params(), shape, jnp.float32)


class RMSNorm(nnx.Module):
    """`x / rms(x) · scale`, in float32 (Zhang and Sennrich 2019).

    With `offset` the stored scale is added to 1, and the product is rounded once, at the end.
    """

    def __init__(self, size: int, eps: float, *, offset: bool = False):
        fill = jnp.zeros if offset else jnp.ones
        self.scale = nnx.Param(fill(size, jnp.float32), axes="norm")
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[…, D]` → the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        row = (None,) * (x.ndim - 1)
        if self.offset:
            return (wide * (1 + self.scale[...][row].astype(jnp.float32))).astype(x.dtype)
        # The normalised value is rounded before scaling, as in the reference implementations.
        return (wide.astype(x.dtype) * self.scale[...][row]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x − mean) / √(variance + ε) · scale + bias`, in float32 (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), axes="norm")
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32), axes="norm")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D]` → the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale, bias = (param[...].astype(jnp.float32) for param in (self.scale, self.bias))
        return (wide * scale[None, None] + bias[None, None]).astype(x.dtype)


def make_norm(config: DecoderConfig, size: int | None = None) -> RMSNorm | LayerNorm:
    """A norm of the model's kind, over the residual stream's width or `size` dimensions."""
    size = config.hidden_size if size is None else size
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps)
    return RMSNorm(size, config.norm_eps, offset=config.norm == "rms_offset")


class Attention(nnx.Module):
    """The projections of grouped-query attention; the attention itself is elsewhere."""

    def __init__(
        self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs,
        quantize: str | None = None,
    ):  # fmt: skip
        hidden, head_dim = config.hidden_size, config.head_dim
        q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
        linear = functools.partial(
            Linear, rngs, lora=lora, layers=config.num_layers, quantize=quantize
        )
        whole = f"heads/{head_dim}"  # shards hold whole heads
        self.query = linear("attention.query", (hidden, q), f"embed {whole}", bias=config.qkv_bias)
        self.key = linear("attention.key", (hidden, kv), "embed kv_heads", bias=config.qkv_bias)
        self.value = linear("attention.value", (hidden, kv), "embed kv_heads", bias=config.qkv_bias)
        self.out = linear("attention.out", (q, hidden), f"{whole} embed", bias=config.out_bias)
        self.head_dim = head_dim
        self.norm_whole = config.qk_norm == "width"
        sizes = (q, kv) if self.norm_whole else (head_dim, head_dim)
        normed = config.qk_norm != "none"
        self.query_norm = make_norm(config, sizes[0]) if normed else None
        self.key_norm = make_norm(config, sizes[1]) if normed else None

    def project(
        self, x: jax.Array, rope: Rope | None, columns: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, T, heads, head_dim]`, normalised and rotated.

        With `columns` `[B, Q]`, the queries of those columns only.
        """
        key = self._heads(self.key(x), self.key_norm, rope)
        value = self._heads(self.value(x), None, None)
        if columns is not None:
            x, rope = jax.tree.map(lambda y: take_columns(y, columns), (x, rope))
        return self._heads(self.query(x), self.query_norm, rope), key, value

    def merge(self, attended: jax.Array) -> jax.Array:
        """`[B, T, H, head_dim]` → `[B, T, D]`."""
        return self.out(attended.reshape(*attended.shape[:2], -1))

    def _heads(
        self, x: jax.Array, norm: RMSNorm | LayerNorm | None, rope: Rope | None
    ) -> jax.Array:
        if norm is not None and self.norm_whole:
            x = norm(x)
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        if norm is not None and not self.norm_whole:
            x = norm(x)
        return x if rope is None else rotate(x, *rope)


class MLP(nnx.Module):
    """`down(act(gate(x)) · up(x))` (Shazeer 2020), or `down(act(up(x)))` without gate."""

    def __init__(
        self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs,
        quantize: str | None = None,
    ):  # fmt: skip
        hidden, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(
            Linear, rngs, bias=config.mlp_bias, lora=lora, layers=config.num_layers,
            quantize=quantize,
        )  # fmt: skip
        self.gate = linear("mlp.gate", (hidden, inner), "embed mlp") if config.gated_mlp else None
        self.up = linear("mlp.up", (hidden, inner), "embed mlp")
        self.down = linear("mlp.down", (inner, hidden), "mlp embed")
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D]` → `[B, T, D]`."""
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x)))
        return self.down(act(self.gate(x)) * self.up(x))
