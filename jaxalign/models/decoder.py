"""The decoder: flax.nnx modules inside, pure functions on a nested dict of arrays outside.

Blocks are stacked along a leading "layers" axis and run by one `lax.scan`, so compile time and
program size do not grow with depth. (Shallow models are unrolled on a CPU: see
`Backend.unrolled_layers`.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxalign.losses.masked import weighted
from jaxalign.losses.router import document_balance
from jaxalign.models.attention.dispatch import Choice, attention_kind, check_kind
from jaxalign.models.attention.kv_cache import Cache, attend_cached, empty_cache, split, write
from jaxalign.models.attention.mask import Marks, Sight
from jaxalign.models.attention.xla import attend
from jaxalign.models.backend import backend
from jaxalign.models.base import DecoderConfig
from jaxalign.models.layers import INIT_STD, MLP, Attention, make_norm
from jaxalign.models.lora import LoraConfig
from jaxalign.models.moe import Experts, Routing
from jaxalign.models.ops import look_up
from jaxalign.models.per_layer import View, layer_traits, make_views
from jaxalign.parallel.shard_map import pad_length
from jaxalign.parallel.sharding import axis_shards, constrain
from jaxalign.types import Array, Params, Weighted

REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What the backward pass keeps of a block: everything, matmul results only, its input only, or that
in the host's memory."""


class Block(nnx.Module):
    """Attention and a feed-forward network, each normalised and added to the residual stream."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        before, after = config.norm_place != "after", config.norm_place != "before"
        self.attention_norm = make_norm(config) if before else None
        self.attention = Attention(config, lora, rngs)
        self.attention_post_norm = make_norm(config) if after else None
        self.mlp_norm = make_norm(config) if before else None
        self.mlp = (Experts if config.num_experts else MLP)(config, lora, rngs)
        self.mlp_post_norm = make_norm(config) if after else None
        self.softcap = config.attention_softcap

    def __call__(
        self, x: jax.Array, view: View, kind: str = "xla"
    ) -> tuple[jax.Array, Routing | None]:
        """`[B, T, D]` → `[B, T, D]`, and what the router did, if there is one."""
        return self.read(x, view, kind)[0]

    def read(
        self, x: jax.Array, view: View, kind: str = "xla"
    ) -> tuple[tuple[jax.Array, Routing | None], tuple[jax.Array, jax.Array]]:
        """Like a call; also gives the keys and values, `[B, T, K, head_dim]`."""
        query, key, value = self._project(x, view)
        attended = attend(query, key, value, view.sight, view.scale, self.softcap, kind=kind)
        return self._finish(x, attended), (key, value)

    def extend(
        self, x: jax.Array, view: View, keys: jax.Array, values: jax.Array, used: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Like a call, but attends to this layer's cache after writing the new tokens to it."""
        query, key, value = self._project(x, view)
        keys, values = write(keys, key, used), write(values, value, used)
        seen = view.sight.matrix
        attended = attend_cached(query, keys, values, seen, view.scale, self.softcap)
        return self._finish(x, attended)[0], keys, values

    def _project(self, x: jax.Array, view: View) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = x if self.attention_norm is None else self.attention_norm(x)
        return self.attention.project(x, view.rope)

    def _finish(self, x: jax.Array, attended: jax.Array) -> tuple[jax.Array, Routing | None]:
        y = self.attention.merge(attended)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = x if self.mlp_norm is None else self.mlp_norm(x)
        y, routing = self.mlp(y) if isinstance(self.mlp, Experts) else (self.mlp(y), None)
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), routing


class Embedding(nnx.Module):
    """Token embeddings `[V, D]`, and position embeddings `[P, D]` where they are learned."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(
            INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes="vocab embed"
        )
        if config.learned_positions:
            shape = (config.max_positions, config.hidden_size)
            noise = jax.random.normal(rngs.params(), shape, jnp.float32)
            self.positions = nnx.Param(INIT_STD * noise, axes="positions embed")


class Head(nnx.Module):
    """An untied output matrix `[D, V]`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.vocab_size)
        self.kernel = nnx.Param(
            INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32), axes="embed vocab"
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
        self.norm = make_norm(config)
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


def _even(inputs: Array, marks: Marks) -> tuple[jax.Array, Marks]:
    """Tokens and their marks with padding at the end where the mesh splits time unevenly."""
    return jax.tree.map(lambda x: pad_length(jnp.asarray(x)), (inputs, marks))


def _layer(stacked: Any, layer: int) -> Any:
    """One layer of what is stacked along a leading axis."""
    return jax.tree.map(lambda x: x[layer], stacked)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder-only language model as pure functions on a nested dict of parameters.

    Attributes:
      config: its shape.
      compute_dtype: dtype of activations and matmuls; parameters keep their own.
      remat: key of `REMAT`.
      lora: low-rank adapters, see `jaxalign.models.lora`.
      attention: which form of attention, see `jaxalign.models.attention.dispatch.KINDS`.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"
    remat: str = "none"
    lora: LoraConfig | None = None
    attention: str = "auto"

    def __post_init__(self):
        check_kind(self.attention)
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
        branch_ids: Array | None = None,
    ) -> jax.Array:
        """Runs the decoder.

        Args:
          params: as `init` or `load_pretrained` gives.
          inputs: int32 `[B, T]` token ids.
          positions: int32 `[B, T]`; by default 0 … T − 1.
          segment_ids: int32 `[B, T]`; a token attends to earlier columns of its own segment. By
            default the whole row is one segment.
          branch_ids: int32 `[B, T]`; within its segment a token attends to branch 0 and its own
            only. By default there are no branches.

        Returns:
          Hidden states `[B, T, D]` after the final norm, in `compute_dtype`.
        """
        return self._run(params, inputs, positions, segment_ids, branch_ids)[0]

    def attention_kind(self, length: int, *, branches: bool = False) -> Choice:
        """Which form of attention rows of this length get, and why.

        Depends on the mesh in context or, without one, on the default device.
        """
        return attention_kind(
            self.attention,
            dtype=self.compute_dtype,
            head_dim=self.config.head_dim,
            length=length,
            softcap=self.config.attention_softcap,
            branches=branches,
        )

    @property
    def extra_terms(self) -> tuple[str, ...]:
        """Names of the loss terms that `apply_with_losses` gives."""
        routed = self.config.num_experts > 0 and self.config.router_aux_coef != 0
        return ("router",) if routed else ()

    def apply_with_losses(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
    ) -> tuple[jax.Array, dict[str, Weighted]]:
        """Like `apply`, with what training adds to any loss.

        Returns:
          (hidden states, `extra_terms`): for a mixture of experts `router`, the load-balancing loss
          of each document (`losses.router.document_balance`) summed over all tokens but padding and
          scaled by `router_aux_coef`.
        """
        if not self.extra_terms:
            return self.apply(params, inputs, positions, segment_ids, branch_ids), {}
        hidden, routing = self._run(
            params, inputs, positions, segment_ids, branch_ids, collect=True
        )
        if segment_ids is None:
            segment_ids = jnp.ones_like(jnp.asarray(inputs))
        segment_ids = jnp.asarray(segment_ids)
        layers = self.config.num_layers
        loss = document_balance(routing.probs / layers, routing.chosen / layers, segment_ids)
        term = weighted(self.config.router_aux_coef * loss, segment_ids > 0)
        return hidden, {"router": term}

    def _run(
        self, params: Params, inputs: Array, positions: Array | None, segment_ids: Array | None,
        branch_ids: Array | None, *, collect: bool = False,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Hidden states, and the sum over layers of what the routers did if that is collected."""
        config = self.config
        inputs = jnp.asarray(inputs)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(inputs)
        length = inputs.shape[1]
        inputs, marks = _even(inputs, Marks(segment_ids, positions, branch_ids))
        view_of, kind = self._views(marks)

        def run(layer: Params, trait: Any, x: jax.Array) -> tuple[jax.Array, Routing | None]:
            x = checkpoint_name(x, "block_input")
            x, routing = self._block(layer)(x, view_of(trait), kind)
            return constrain(x, "rows length hidden"), routing if collect else None

        policy = REMAT[self.remat]
        if policy is not None:
            run = jax.checkpoint(run, policy=policy, prevent_cse=False)

        def step(carry: Any, xs: Any) -> tuple[Any, None]:
            x, total = carry
            layer, trait = xs
            x, routing = run(layer, trait, x)
            return (x, jax.tree.map(jnp.add, total, routing)), None

        nothing = None
        if collect:
            zeros = jnp.zeros((*inputs.shape, config.num_experts), jnp.float32)
            nothing = Routing(zeros, zeros)
        x = self._embed(params, inputs, marks.positions, marks.segments, "rows length hidden")
        carry = (x, nothing)
        layers = (params["blocks"], layer_traits(config))
        unroll = config.num_layers if config.num_layers <= backend().unrolled_layers else 1
        (x, total), _ = jax.lax.scan(step, carry, layers, unroll=unroll)
        return jax.tree.map(lambda y: y[:, :length], (self._norm(params, x), total))

    def _views(self, marks: Marks) -> tuple[Callable[[Any], View], str]:
        """How layers look at whole rows, and by which form of attention."""
        length = marks.segments.shape[1]
        kind = self.attention_kind(length, branches=marks.branches is not None).kind
        short = length <= backend().attention_mask_length and axis_shards("length") == 1
        matrix = kind == "xla" and short
        return make_views(self.config, Sight(marks, marks), matrix=matrix), kind

    def init_cache(self, rows: int, length: int, dtype: Any = None) -> Cache:
        """An empty key-value cache for `rows` sequences of up to `length` tokens."""
        return empty_cache(
            self.config, rows, length, self.compute_dtype if dtype is None else dtype
        )

    def prefill(
        self, params: Params, inputs: Array, positions: Array, segment_ids: Array, dtype: Any = None
    ) -> tuple[jax.Array, Cache]:
        """Reads whole rows, as `apply` does, and keeps their keys and values.

        Args:
          params: as for `apply`.
          inputs, positions, segment_ids: as for `apply`, `[B, T]`.
          dtype: of keys and values; None: `compute_dtype`.

        Returns:
          Hidden states `[B, T, D]`, and a full cache of T columns.
        """
        config, kind = self.config, self.compute_dtype if dtype is None else dtype
        positions, segment_ids = (jnp.asarray(x, jnp.int32) for x in (positions, segment_ids))
        length = positions.shape[1]
        inputs, marks = _even(inputs, Marks(segment_ids, positions))
        view_of, form = self._views(marks)

        def run(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            layer, trait = xs
            (x, _), kept = self._block(layer).read(x, view_of(trait), form)
            kept = jax.tree.map(lambda y: y[:, :length].astype(kind).transpose(0, 2, 1, 3), kept)
            return constrain(x, "rows length hidden"), kept

        x = self._embed(params, inputs, marks.positions, marks.segments, "rows length hidden")
        x, stacked = jax.lax.scan(run, x, (params["blocks"], layer_traits(config)))
        keys, values = (
            tuple(split(y[layer]) for layer in range(config.num_layers)) for y in stacked
        )
        used = jnp.asarray(length, jnp.int32)
        return self._norm(params, x)[:, :length], Cache(keys, values, segment_ids, positions, used)

    def by_layer(self, params: Params) -> Params:
        """The same parameters with the blocks as a tuple of layers, which `extend` takes too.

        A loop over tokens then finds each layer's weights lying by themselves. Where slicing the
        stack costs nothing (accelerators read a slice in place) this is only a second copy.
        """
        layers = range(self.config.num_layers)
        blocks = tuple(_layer(params["blocks"], layer) for layer in layers)
        return params | {"blocks": blocks}

    def extend(
        self, params: Params, cache: Cache, inputs: Array, positions: Array, segment_ids: Array
    ) -> tuple[jax.Array, Cache]:
        """Reads T more tokens of every row into the cache, T small: one step of decoding.

        The layers are laid out one after another, not scanned: see `models.attention.kv_cache`.

        Args:
          params: as for `apply`, or what `by_layer` makes of them.
          cache: with at least T free columns.
          inputs: int32 `[B, T]`.
          positions: int32 `[B, T]`.
          segment_ids: int32 `[B, T]`; 0 marks padding, which later tokens never see.

        Returns:
          Hidden states `[B, T, D]` of the new tokens, and the cache with them in it.
        """
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.used))
        positions = jnp.asarray(positions, jnp.int32)
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.used))
        sight = Sight(Marks(segment_ids, positions), Marks(segments, seen), cached=True)
        view_of = make_views(self.config, sight, matrix=True)
        blocks, traits = params["blocks"], layer_traits(self.config)
        keys, values = list(cache.keys), list(cache.values)
        x = self._embed(params, inputs, positions, segment_ids, "rows new hidden")
        for layer in range(self.config.num_layers):
            own = blocks[layer] if isinstance(blocks, tuple) else _layer(blocks, layer)
            x, keys[layer], values[layer] = self._block(own).extend(
                x, view_of(_layer(traits, layer)), keys[layer], values[layer], cache.used
            )
            x = constrain(x, "rows new hidden")
        used = cache.used + segment_ids.shape[1]
        cache = Cache(tuple(keys), tuple(values), segments, seen, used)
        return self._norm(params, x), cache

    def head(self, params: Params) -> jax.Array:
        """The output matrix `[D, V]`: the head, or the transposed embedding where tied."""
        if self.config.tie_embeddings:
            return jnp.transpose(params["embed"]["embedding"])
        return params["head"]["kernel"]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[B, T, V]`, whole: for inspection and single positions, not training."""
        head = self.head(params).astype(hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        return self.finish_logits(logits)

    def finish_logits(self, logits: jax.Array) -> jax.Array:
        """What comes after the product with the head: `c · tanh(logits / c)`, or nothing."""
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embed(
        self, params: Params, inputs: Array, positions: Array, segment_ids: Array, axes: str
    ) -> jax.Array:
        embed = params["embed"]
        x = look_up(embed["embedding"], jnp.asarray(inputs), axes.split()[1])
        if self.config.learned_positions:
            # Positions that the table lacks give NaN: a loud end instead of a wrong embedding.
            # Padding may hold any position.
            known = jnp.where(jnp.asarray(segment_ids) > 0, jnp.asarray(positions), 0)
            x = x + jnp.take(embed["positions"], known, axis=0, mode="fill", fill_value=jnp.nan)
        x = x.astype(self.compute_dtype)
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        return constrain(x, axes)

    def _block(self, layer: Params) -> Block:
        graphdef, state = _abstract_block(self.config, self.lora)
        return nnx.merge(graphdef, _with_values(state, layer))

    def _norm(self, params: Params, x: jax.Array) -> jax.Array:
        norm = make_norm(self.config)
        for name, value in params["norm"].items():
            getattr(norm, name)[...] = value
        return norm(x)
