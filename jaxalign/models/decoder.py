"""The decoder: flax.nnx modules inside, pure functions on a nested dict of arrays outside.

Blocks are stacked along a leading "layers" axis and run by one `lax.scan`, so compile time and
program size do not grow with depth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.attention import (
    Cache,
    attend,
    cache_mask,
    causal_mask,
    rope_tables,
    rotate,
)
from jaxalign.models.base import DecoderConfig
from jaxalign.models.lora import LoraConfig
from jaxalign.models.matmul import project
from jaxalign.sharding import constrain
from jaxalign.types import Array, Params

_INIT_STD = 0.02

REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of a block: everything, matmul results only, or its input only."""


class Linear(nnx.Module):
    """`x @ kernel (+ bias) (+ α/r · (x @ lora_a) @ lora_b)` in the dtype of x."""

    def __init__(
        self, rngs: nnx.Rngs, name: str, sizes: tuple[int, int], axes: str, *, bias: bool,
        lora: LoraConfig | None,
    ):  # fmt: skip
        fan_in, fan_out = sizes
        in_axis, out_axis = axes.split()
        self.kernel = nnx.Param(
            _INIT_STD * jax.random.normal(rngs.params(), sizes, jnp.float32), axes=axes
        )
        # On the output projection the output axis is the residual stream, which stays whole.
        bias_axis = "norm" if out_axis == "embed" else out_axis
        self.bias = nnx.Param(jnp.zeros(fan_out, jnp.float32), axes=bias_axis) if bias else None
        self.lora_scale = 0.0
        if lora is None or name not in lora.targets:
            self.lora_a = self.lora_b = None
            return
        # One factor is zero, so that the adapted model starts as the base (Hu et al. 2021).
        a = jax.random.normal(rngs.params(), (fan_in, lora.rank), jnp.float32) / fan_in**0.5
        b = jnp.zeros((lora.rank, fan_out), jnp.float32)
        self.lora_a = nnx.Param(a, axes=f"{in_axis} rank")
        self.lora_b = nnx.Param(b, axes=f"rank {out_axis}")
        self.lora_scale = lora.alpha / lora.rank

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, in]` → `[B, T, out]`."""
        y = project(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, None]
        if self.lora_a is not None and self.lora_b is not None:
            down = x @ self.lora_a[...].astype(x.dtype)
            y = y + self.lora_scale * (down @ self.lora_b[...].astype(x.dtype))
        return y


class RMSNorm(nnx.Module):
    """`x / rms(x) · scale`, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), axes="norm")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D]` → the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # The normalised value is rounded before scaling, as the reference implementations do.
        return (wide.astype(x.dtype) * self.scale[...][None, None]).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        hidden, head_dim = config.hidden_size, config.head_dim
        q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
        linear = functools.partial(Linear, rngs, lora=lora)
        self.query = linear("query", (hidden, q), "embed heads", bias=config.qkv_bias)
        self.key = linear("key", (hidden, kv), "embed kv_heads", bias=config.qkv_bias)
        self.value = linear("value", (hidden, kv), "embed kv_heads", bias=config.qkv_bias)
        self.out = linear("out", (q, hidden), "heads embed", bias=config.out_bias)
        self.head_dim = head_dim

    def project(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, T, heads, head_dim]`, rotated."""
        split = (*x.shape[:2], -1, self.head_dim)
        query = rotate(self.query(x).reshape(split), *rope)
        key = rotate(self.key(x).reshape(split), *rope)
        return query, key, self.value(x).reshape(split)

    def merge(self, attended: jax.Array) -> jax.Array:
        """`[B, T, H, head_dim]` → `[B, T, D]`."""
        return self.out(attended.reshape(*attended.shape[:2], -1))


class MLP(nnx.Module):
    """`down(silu(gate(x)) · up(x))` (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(Linear, rngs, bias=config.mlp_bias, lora=lora)
        self.gate = linear("gate", (hidden, inner), "embed mlp")
        self.up = linear("up", (hidden, inner), "embed mlp")
        self.down = linear("down", (inner, hidden), "mlp embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, D]` → `[B, T, D]`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, lora, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, lora, rngs)

    def __call__(self, x: jax.Array, rope: Any, mask: jax.Array) -> jax.Array:
        """`[B, T, D]` → `[B, T, D]`."""
        query, key, value = self.attention.project(self.attention_norm(x), rope)
        x = x + self.attention.merge(attend(query, key, value, mask))
        return x + self.mlp(self.mlp_norm(x))

    def extend(
        self, x: jax.Array, rope: Any, mask: jax.Array, keys: jax.Array, values: jax.Array,
        layer: jax.Array, used: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Like a call, but attends to this layer's cache after writing the new tokens to it."""
        query, key, value = self.attention.project(self.attention_norm(x), rope)
        column = (layer, 0, used, 0, 0)
        put = jax.lax.dynamic_update_slice
        keys = put(keys, key.astype(keys.dtype)[None], column)
        values = put(values, value.astype(values.dtype)[None], column)
        own_keys = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
        own_values = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
        attended = attend(query, own_keys.astype(x.dtype), own_values.astype(x.dtype), mask)
        x = x + self.attention.merge(attended)
        return x + self.mlp(self.mlp_norm(x)), keys, values


class Embedding(nnx.Module):
    """Token embeddings `[V, D]`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            _INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes="vocab embed"
        )


class Head(nnx.Module):
    """An untied output matrix `[D, V]`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.vocab_size)
        self.kernel = nnx.Param(
            _INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes="embed vocab"
        )


class Stack(nnx.Module):
    """The whole network; its parameter tree is the public one."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.embed = Embedding(config, rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, lora, rngs)

        self.blocks = blocks(rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Head(config, rngs)


@functools.lru_cache(maxsize=64)
def _abstract_stack(config: DecoderConfig, lora: LoraConfig | None) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Stack(config, lora, nnx.Rngs(0))))


@functools.lru_cache(maxsize=64)
def _abstract_block(config: DecoderConfig, lora: LoraConfig | None) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Block(config, lora, nnx.Rngs(0))))


def _with_values(state: Any, values: Params) -> Any:
    """A copy of an abstract nnx state that holds the given nested dict of arrays."""
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, values)
    return state


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder-only language model as pure functions on a nested dict of parameters.

    Attributes:
      config: its shape.
      compute_dtype: dtype of activations and matmuls; parameters keep their own.
      remat: key of `REMAT`.
      lora: low-rank adapters, see `jaxalign.models.lora`.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"
    remat: str = "none"
    lora: LoraConfig | None = None

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}: wanted one of {', '.join(REMAT)}")
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r}: wanted float32, bfloat16 or float16"
            )

    @property
    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s, float32."""
        _, state = _abstract_stack(self.config, self.lora)
        return nnx.to_pure_dict(state)

    @property
    def axes(self) -> Params:
        """The parameter tree with the logical axes of each leaf, e.g. "layers embed mlp"."""
        _, state = _abstract_stack(self.config, self.lora)

        def axes_of(path: Any, variable: nnx.Variable) -> str:
            stacked = path[0].key == "blocks"
            return f"layers {variable.axes}" if stacked else variable.axes

        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        tree = jax.tree_util.tree_map_with_path(axes_of, state, is_leaf=is_variable)
        return nnx.to_pure_dict(tree)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters: N(0, 0.02²) matrices, unit norms, zero biases."""
        _, state = nnx.split(Stack(self.config, self.lora, nnx.Rngs(params=key)))
        return nnx.to_pure_dict(state)

    def apply(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> jax.Array:
        """Runs the decoder.

        Args:
          params: as `init` or `load_pretrained` gives.
          inputs: int32 `[B, T]` token ids.
          positions: int32 `[B, T]`; by default 0 … T − 1.
          segment_ids: int32 `[B, T]`; a token attends to earlier columns of its own segment. By
            default the whole row is one segment.

        Returns:
          Hidden states `[B, T, D]` after the final norm, in `compute_dtype`.
        """
        inputs = jnp.asarray(inputs)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(inputs)
        mask = causal_mask(segment_ids)
        rope = rope_tables(self.config.rope, self.config.head_dim, positions)

        def run(layer: Params, x: jax.Array) -> jax.Array:
            return constrain(self._block(layer)(x, rope, mask), "rows length hidden")

        policy = REMAT[self.remat]
        if policy is not None:
            run = jax.checkpoint(run, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(
            lambda x, layer: (run(layer, x), None), self._embed(params, inputs), params["blocks"]
        )
        return self._norm(params, x)

    def init_cache(self, rows: int, length: int, dtype: Any = None) -> Cache:
        """An empty key-value cache for `rows` sequences of up to `length` tokens."""
        config = self.config
        shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
        dtype = self.compute_dtype if dtype is None else dtype
        return Cache(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.zeros((rows, length), jnp.int32),
            used=jnp.zeros((), jnp.int32),
        )

    def extend(
        self, params: Params, cache: Cache, inputs: Array, positions: Array, segment_ids: Array
    ) -> tuple[jax.Array, Cache]:
        """Reads T more tokens of every row into the cache: prefill (T large) or decode (T = 1).

        Args:
          params: as for `apply`.
          cache: with at least T free columns.
          inputs: int32 `[B, T]`.
          positions: int32 `[B, T]`.
          segment_ids: int32 `[B, T]`; 0 marks padding, which later tokens never see.

        Returns:
          Hidden states `[B, T, D]` of the new tokens, and the cache with them in it.
        """
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.used))
        mask = cache_mask(segments, segment_ids, cache.used)
        rope = rope_tables(self.config.rope, self.config.head_dim, positions)

        # The cache rides in the carry, where XLA updates it in place; as a scanned input and
        # output it would be copied whole for every token.
        def run(carry: Any, xs: Any) -> tuple[Any, None]:
            x, keys, values = carry
            layer, index = xs
            return self._block(layer).extend(x, rope, mask, keys, values, index, cache.used), None

        carry = (self._embed(params, inputs), cache.keys, cache.values)
        layers = jnp.arange(self.config.num_layers)
        (x, keys, values), _ = jax.lax.scan(run, carry, (params["blocks"], layers))
        used = cache.used + segment_ids.shape[1]
        return self._norm(params, x), Cache(keys, values, segments, used)

    def head(self, params: Params) -> jax.Array:
        """The output matrix `[D, V]`: the head, or the transposed embedding where tied."""
        if self.config.tie_embeddings:
            return jnp.transpose(params["embed"]["embedding"])
        return params["head"]["kernel"]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[B, T, V]`, whole: for inspection and single positions, not training."""
        head = self.head(params).astype(hidden.dtype)
        return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)

    def _embed(self, params: Params, inputs: Array) -> jax.Array:
        x = jnp.take(params["embed"]["embedding"], jnp.asarray(inputs), axis=0, mode="clip")
        return constrain(x.astype(self.compute_dtype), "rows length hidden")

    def _block(self, layer: Params) -> Block:
        graphdef, state = _abstract_block(self.config, self.lora)
        return nnx.merge(graphdef, _with_values(state, layer))

    def _norm(self, params: Params, x: jax.Array) -> jax.Array:
        norm = RMSNorm(self.config.hidden_size, self.config.norm_eps)
        norm.scale[...] = params["norm"]["scale"]
        return norm(x)
