"""The network as flax.nnx modules: a block, the embedding, the head, and the stack of them.

`jaxalign.models.decoder` wraps them in pure functions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.models.adapters import adapter_of, column_lengths
from jaxalign.models.attention.kv_cache import attend_cached, write
from jaxalign.models.attention.xla import attend
from jaxalign.models.base import DecoderConfig, LoraConfig
from jaxalign.models.layers import INIT_STD, MLP, Attention, draw_factor, make_norm
from jaxalign.models.moe import Experts, Routing
from jaxalign.models.ops import take_columns
from jaxalign.models.per_layer import AttentionInputs
from jaxalign.types import Params


class Block(nnx.Module):
    """Attention and a feed-forward network, each normalised and added to the residual stream."""

    def __init__(
        self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs,
        quantize: str | None = None,
    ):  # fmt: skip
        before, after = config.norm_place != "after", config.norm_place != "before"
        self.attention_norm = make_norm(config) if before else None
        self.attention = Attention(config, lora, rngs, quantize)
        self.attention_post_norm = make_norm(config) if after else None
        self.mlp_norm = make_norm(config) if before else None
        self.mlp = (Experts if config.num_experts else MLP)(config, lora, rngs, quantize)
        self.mlp_post_norm = make_norm(config) if after else None
        self.softcap = config.attention_softcap

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, kind: str, experts: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """`[B, T, D]` → `[B, T, D]`, and the router's choices, if there is a router."""
        return self.with_keys_values(x, inputs, kind, experts)[0]

    def at_columns(self, x: jax.Array, inputs: AttentionInputs, columns: jax.Array) -> jax.Array:
        """`[B, T, D]` → `[B, Q, D]`: a call's results at `columns` `[B, Q]`, and no others.

        Keys and values are formed at every column, the rest at Q of them.
        """
        query, key, value = self._project(x, inputs, columns)
        mask = inputs.mask.at_columns(columns)
        attended = attend(query, key, value, mask, inputs.scale, self.softcap)
        return self._finish(take_columns(x, columns), attended)[0]

    def with_keys_values(
        self, x: jax.Array, inputs: AttentionInputs, kind: str, experts: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, Routing | None], tuple[jax.Array, jax.Array]]:
        """Like a call; also returns keys and values, `[B, T, K, head_dim]`.

        Args:
          x: `[B, T, D]`.
          inputs: mask, rotation and scale.
          kind: the kind of attention, see `jaxalign.models.attention.dispatch`.
          experts: integers `[B, T, k]`, the experts to use; None: the router chooses.
        """
        query, key, value = self._project(x, inputs)
        attended = attend(query, key, value, inputs.mask, inputs.scale, self.softcap, kind=kind)
        return self._finish(x, attended, experts), (key, value)

    def extend(
        self, x: jax.Array, inputs: AttentionInputs, keys: jax.Array, values: jax.Array,
        used: jax.Array,
    ) -> tuple[tuple[jax.Array, Routing | None], jax.Array, jax.Array]:  # fmt: skip
        """Like a call, but attends to this layer's cache after writing the new tokens to it.

        Args:
          x: `[B, T, D]`, T new tokens of each row.
          inputs: as for a call; the mask is a matrix `[B, 1, T, S]`.
          keys, values: this layer's cache, `[B, K, S, head_dim]`.
          used: the column to write next, an int32 scalar or `[B]`.
        """
        query, key, value = self._project(x, inputs)
        keys, values = write(keys, key, used), write(values, value, used)
        mask = inputs.mask.matrix
        attended = attend_cached(query, keys, values, mask, inputs.scale, self.softcap)
        return self._finish(x, attended), keys, values

    def _project(
        self, x: jax.Array, inputs: AttentionInputs, columns: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[B, T, D]` → queries `[B, T, H, d]`, keys and values `[B, T, K, d]`."""
        x = x if self.attention_norm is None else self.attention_norm(x)
        return self.attention.project(x, inputs.rope, columns)

    def _finish(
        self, x: jax.Array, attended: jax.Array, experts: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """Output projection and MLP, each added to the residual stream `[B, T, D]`."""
        y = self.attention.merge(attended)  # [B, T, H, d] → [B, T, D]
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = x if self.mlp_norm is None else self.mlp_norm(x)
        routing = None
        if isinstance(self.mlp, Experts):
            y, routing = self.mlp(y, experts)
        else:
            y = self.mlp(y)
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), routing


class Embedding(nnx.Module):
    """Token embeddings `[V, D]`, and position embeddings `[P, D]` if they are learned."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes="vocab embed"
        )
        if config.learned_positions:
            shape = (config.max_positions, config.hidden_size)
            noise = jax.random.normal(rngs.params(), shape, jnp.float32)
            self.positions = nnx.Param(INIT_STD * noise, axes="positions embed")
        adapter = adapter_of(lora, "embed")
        if lora is None or adapter is None:
            return
        rows, width = config.vocab_size, config.hidden_size
        # A is looked up, not multiplied: as in the reference implementation, A starts as zero.
        b = jax.random.normal(rngs.params(), (adapter.rank, width), jnp.float32)
        a = jnp.zeros((rows, adapter.rank), jnp.float32)
        self.lora_a = nnx.Param(a, axes="vocab rank")
        self.lora_b = nnx.Param(b, axes="rank embed")
        if lora.dora:
            self.lora_m = nnx.Param(column_lengths(self.embedding[...]), axes="norm")


class Head(nnx.Module):
    """An output matrix `[D, V]`; if it is the tied embedding, only its adapter."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.vocab_size)
        if not config.tie_embeddings:
            self.kernel = nnx.Param(
                INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes="embed vocab"
            )
        adapter = adapter_of(lora, "lm_head")
        if lora is None or adapter is None:
            return
        width, rows = shape
        a = draw_factor(rngs, (width, adapter.rank), lora.init) / width**0.5
        self.lora_a = nnx.Param(a, axes="embed rank")
        self.lora_b = nnx.Param(jnp.zeros((adapter.rank, rows), jnp.float32), axes="rank vocab")
        if lora.dora:
            self.lora_m = nnx.Param(jnp.ones(rows, jnp.float32), axes="vocab")


class Stack(nnx.Module):
    """The whole network; its parameter tree is the public parameter tree."""

    def __init__(
        self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs,
        quantize: str | None = None,
    ):  # fmt: skip
        self.embed = Embedding(config, lora, rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, lora, rngs, quantize)

        self.blocks = blocks(rngs)
        self.norm = make_norm(config)
        has_head = not config.tie_embeddings or adapter_of(lora, "lm_head") is not None
        self.head = Head(config, lora, rngs) if has_head else None


@functools.lru_cache(maxsize=64)
def abstract_stack(
    config: DecoderConfig, lora: LoraConfig | None, quantize: str | None = None
) -> tuple[Any, Any]:
    """Graph definition and abstract state of the whole network."""
    return nnx.split(nnx.eval_shape(lambda: Stack(config, lora, nnx.Rngs(0), quantize)))


@functools.lru_cache(maxsize=64)
def abstract_block(
    config: DecoderConfig, lora: LoraConfig | None, quantize: str | None = None
) -> tuple[Any, Any]:
    """Graph definition and abstract state of one block."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, lora, nnx.Rngs(0), quantize)))


def with_values(state: Any, values: Params) -> Any:
    """A copy of an abstract nnx state that holds the given nested dict of arrays."""
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, values)
    return state
