"""The decoder: pure functions on a nested dict of arrays, over the modules of `models.network`.

Blocks are stacked along a leading "layers" axis and run in one `lax.scan`, so that compile time and
program size do not grow with depth. There are two exceptions: shallow models on a CPU are unrolled
(`Backend.unrolled_layers`), and so is every decode step (`Decoder.extend`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxalign.losses.masked import weighted
from jaxalign.losses.router import document_balance
from jaxalign.models.adapters import (
    adapted_matrix,
    adapter_of,
    frozen_layers,
    with_layer_scales,
    with_ranks,
    without_adapters,
)
from jaxalign.models.attention.dispatch import (
    AttentionKind,
    attention_kind,
    check_kind,
    report_fallback,
)
from jaxalign.models.attention.kv_cache import Cache, empty_cache, split, to_cache, write_columns
from jaxalign.models.attention.mask import MaskSpec, Segments
from jaxalign.models.backend import backend
from jaxalign.models.base import DecoderConfig, LoraConfig
from jaxalign.models.embedding import embed_tokens
from jaxalign.models.layer_loop import REMAT, layers_of, recomputed, run_some, saves_columns
from jaxalign.models.layers import make_norm
from jaxalign.models.moe import Routing, expert_dtype, expert_numbers
from jaxalign.models.network import Block, Stack, abstract_block, abstract_stack, with_values
from jaxalign.models.ops import take_columns
from jaxalign.models.per_layer import LayerAttributes, attention_inputs, layer_attributes
from jaxalign.models.quantized import check_kind as check_quantize
from jaxalign.models.rows import Rows, layer_rows, like_rows, pad_to_shards, segments_of
from jaxalign.parallel.sharding import constrain
from jaxalign.parallel.zigzag import from_zigzag
from jaxalign.types import Array, EmbeddingNoise, LowerStates, Params, Weighted


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder-only language model as pure functions on a nested dict of parameters.

    Attributes:
      config: its shape.
      compute_dtype: dtype of activations and matmuls; parameters keep their own.
      remat: key of `REMAT`.
      lora: low-rank adapters, see `jaxalign.models.lora`.
      attention: the kind of attention, see `jaxalign.models.attention.dispatch.KINDS`.
      quantize: the quantisation of its blocks' projections, which are then frozen, see
        `jaxalign.models.quantized`; None: floats.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"
    remat: str = "none"
    lora: LoraConfig | None = None
    attention: str = "auto"
    quantize: str | None = None

    def __post_init__(self):
        check_kind(self.attention)
        check_quantize(self.quantize)
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}: wanted one of {', '.join(REMAT)}")
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r}: wanted float32, bfloat16 or float16"
            )

    @property
    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s, float32 unless quantised."""
        _, state = abstract_stack(self.config, self.lora, self.quantize)
        return nnx.to_pure_dict(state)

    @property
    def axes(self) -> Params:
        """The parameter tree with the logical axes of each leaf, e.g. "layers embed mlp"."""
        _, state = abstract_stack(self.config, self.lora, self.quantize)

        def axes_of(path: Any, variable: nnx.Variable) -> str:
            stacked = path[0].key == "blocks"
            return f"layers {variable.axes}" if stacked else variable.axes

        def is_variable(x: Any) -> bool:
            return isinstance(x, nnx.Variable)

        tree = jax.tree_util.tree_map_with_path(axes_of, state, is_leaf=is_variable)
        return nnx.to_pure_dict(tree)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters: N(0, 0.02²) matrices, unit norms, zero biases."""
        _, state = nnx.split(Stack(self.config, self.lora, nnx.Rngs(params=key), self.quantize))
        params = nnx.to_pure_dict(state)
        if self.lora is None:
            return params
        blocks = with_ranks(params["blocks"], self.lora, self.config.num_layers)
        return params | {"blocks": blocks}

    def apply(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
        noise: EmbeddingNoise | None = None,
        experts: Array | None = None,
        columns: Array | None = None,
        lower: LowerStates | None = None,
    ) -> jax.Array:
        """Runs the decoder.

        Args:
          params: the parameters, from `init` or `load_pretrained`.
          inputs: int32 `[B, T]` token ids.
          positions: int32 `[B, T]`; by default 0 … T − 1.
          segment_ids: int32 `[B, T]`; a token attends to earlier columns of its own segment. By
            default the whole row is one segment.
          branch_ids: int32 `[B, T]`; within its segment a token attends only to branch 0 and its
            own branch. By default there are no branches.
          noise: noise for the embeddings, added before `embed_scale`. By default there is none.
          experts: integers `[B, T, L, k]`, the experts that tokens take in each layer. By default
            the routers choose.
          columns: int32 `[B, Q]`, the columns whose hidden states are wanted, which may save most
            of the last layer. By default all.
          lower: what `lower_states` gave for these rows, instead of the embeddings and the lowest
            layers, which then have no gradient. By default they are run.

        Returns:
          Hidden states `[B, T, D]`, or `[B, Q, D]`, after the final norm, in `compute_dtype`.
        """
        return self._run(
            params, inputs, positions, segment_ids, branch_ids, noise, experts, columns, lower
        )[0]

    def attention_kind(self, length: int, *, branches: bool = False) -> AttentionKind:
        """The kind of attention for rows of this length, and why.

        It depends on the mesh in context or, without one, on the default device.
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
        """Names of the loss terms that `apply_with_losses` returns."""
        routed = self.config.num_experts > 0 and self.config.router_aux_coef != 0
        return ("router",) if routed else ()

    def apply_with_losses(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
        noise: EmbeddingNoise | None = None,
        experts: Array | None = None,
    ) -> tuple[jax.Array, dict[str, Weighted]]:
        """Like `apply`, and also returns the terms that training adds to any loss.

        Returns:
          (hidden states, `extra_terms`): for a mixture of experts `router`, the load-balancing loss
          of each document (`losses.router.document_balance`) summed over all tokens except padding
          and scaled by `router_aux_coef`.
        """
        if not self.extra_terms:
            args = (inputs, positions, segment_ids, branch_ids, noise, experts)
            return self.apply(params, *args), {}
        hidden, routing = self._run(
            params, inputs, positions, segment_ids, branch_ids, noise, experts, collect=True
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
        branch_ids: Array | None, noise: EmbeddingNoise | None = None,
        experts: Array | None = None, columns: Array | None = None,
        lower: LowerStates | None = None, *, collect: bool = False,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Hidden states `[B, T, D]`; with `collect` also the routing, summed over layers."""
        config = self.config
        length = jnp.shape(inputs)[1]
        segments = segments_of(inputs, positions, segment_ids, branch_ids)
        rows = self._rows(inputs, segments, balance=True)
        inputs, _, inputs_of, kind, zigzag = rows
        below = self.frozen_layers if lower is None else lower.layers

        def block(
            layer: Params, attributes: LayerAttributes, x: jax.Array, experts: jax.Array | None
        ) -> tuple[jax.Array, Routing | None]:
            """One block: `[B, T, D]` → `[B, T, D]`."""
            x = checkpoint_name(x, "block_input")
            x, routing = self._block(layer)(x, inputs_of(attributes), kind, experts)
            x = constrain(x, "rows length hidden")
            return x, routing._replace(experts=None) if routing and collect else None

        run = recomputed(block, self.remat)

        def step(carry: Any, xs: Any) -> tuple[Any, None]:
            x, total = carry
            layer, attributes, experts = xs
            x, routing = run(layer, attributes, x, experts)
            return (x, jax.tree.map(jnp.add, total, routing)), None

        total = None
        if collect:
            zeros = jnp.zeros((*inputs.shape, config.num_experts), jnp.float32)  # [B, T, E]
            total = Routing(zeros, zeros)
        if lower is None:
            x = self._lowest(params, rows, below, noise)
        else:
            assert lower.hidden is not None
            x = constrain(like_rows(lower.hidden, inputs.shape[1], zigzag), "rows length hidden")
        if experts is not None:  # [B, T, L, k] → [L, B, T, k]
            experts = jnp.moveaxis(like_rows(experts, inputs.shape[1], zigzag), 2, 0)
        layers = (self._stacked(params), layer_attributes(config), experts)  # [L, …] each
        unrolled = config.num_layers <= backend().unrolled_layers
        unroll = config.num_layers - below if unrolled else 1
        if below and unrolled:
            layers = layers_of(layers, slice(below, None))
        some = None if columns is None else columns.shape[1]
        if unrolled and saves_columns(config, kind, length, some):
            # A slice of the stacked layers would be a copy of them in a loop, but not unrolled.
            first = layers_of(layers, slice(0, -1))
            last, attributes, _ = layers_of(layers, -1)
            (x, total), _ = jax.lax.scan(step, (x, total), first, unroll=unroll)

            def read(layer: Params, x: jax.Array, columns: jax.Array) -> jax.Array:
                x = checkpoint_name(x, "block_input")
                return self._block(layer).at_columns(x, inputs_of(attributes), columns)

            x = recomputed(read, self.remat)(last, x, jnp.asarray(columns))
            return self._norm(params, constrain(x, "rows length hidden")), total
        if below and not unrolled:  # no mixture of experts
            x = run_some(
                lambda xs, x: block(xs[0], xs[1], x, None)[0],
                layers, x, below, config.num_layers, remat=self.remat,
            )  # fmt: skip
        else:
            (x, total), _ = jax.lax.scan(step, (x, total), layers, unroll=unroll)
        results = (self._norm(params, x), total)
        if zigzag:
            results = jax.tree.map(from_zigzag, results)
        x, total = jax.tree.map(lambda y: y[:, :length], results)
        return x if columns is None else take_columns(x, columns), total

    @property
    def frozen_layers(self) -> int:
        """How many of the lowest layers training leaves alone, see `lower_states`.

        0 for a mixture of experts, whose routers' figures are of all layers.
        """
        return 0 if self.config.num_experts else frozen_layers(self.lora, self.config.num_layers)

    def lower_states(
        self, params: Params, inputs: Array, positions: Array | None = None,
        segment_ids: Array | None = None, branch_ids: Array | None = None,
    ) -> LowerStates:  # fmt: skip
        """Hidden states `[B, T, D]` above the lowest `frozen_layers` layers; arguments as `apply`.

        Where only upper layers have adapters, these states are the same in every update, and in the
        base without adapters: compute them once, and give them to `apply` as `lower`.
        """
        segments = segments_of(inputs, positions, segment_ids, branch_ids)
        rows = self._rows(inputs, segments, balance=True)
        x = self._lowest(params, rows, self.frozen_layers)
        x = from_zigzag(x) if rows.zigzag else x
        return LowerStates(x[:, : jnp.shape(inputs)[1]], self.frozen_layers)

    def _lowest(
        self, params: Params, rows: Rows, count: int, noise: EmbeddingNoise | None = None
    ) -> jax.Array:
        """The embeddings `[B, T, D]`, after the lowest `count` layers, which have no adapters."""
        inputs, segments, inputs_of, kind, zigzag = rows
        if noise is not None:
            noise = jax.tree.map(lambda part: like_rows(part, inputs.shape[1], zigzag), noise)
        place = segments.positions, segments.ids
        x = self._embed(params, inputs, *place, "rows length hidden", noise)
        if count == 0:
            return x
        plain = dataclasses.replace(self, lora=None)

        def block(layer: tuple[Params, LayerAttributes], x: jax.Array) -> jax.Array:
            x = checkpoint_name(x, "block_input")
            x, _ = plain._block(layer[0])(x, inputs_of(layer[1]), kind)
            return constrain(x, "rows length hidden")

        # Without their adapters' zeros, nothing of these layers has a gradient.
        layers = (without_adapters(params["blocks"]), layer_attributes(self.config))
        return run_some(block, layers, x, 0, count, remat=self.remat)

    def _rows(self, inputs: Array, segments: Segments, *, balance: bool) -> Rows:
        """Whole rows `[B, T]` in the form for the layers; `balance` as for `layer_rows`."""
        inputs, segments = pad_to_shards(inputs, segments)
        choice = self.attention_kind(inputs.shape[1], branches=segments.branches is not None)
        report_fallback(choice)
        return layer_rows(
            self.config, self.compute_dtype, choice, inputs, segments, balance=balance
        )

    def init_cache(
        self, rows: int, length: int, dtype: Any = None, *, keep_experts: bool = False
    ) -> Cache:
        """An empty key-value cache for `rows` sequences of up to `length` tokens.

        With `keep_experts` it also stores the experts that each token takes.
        """
        experts = expert_dtype(self.config) if keep_experts else None
        dtype = self.compute_dtype if dtype is None else dtype
        return empty_cache(self.config, rows, length, dtype, experts)

    def prefill(
        self, params: Params, inputs: Array, positions: Array, segment_ids: Array,
        dtype: Any = None, *, keep_experts: bool = False,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Reads whole rows, as `apply` does, and stores their keys and values.

        Args:
          params: as for `apply`.
          inputs, positions, segment_ids: as for `apply`, `[B, T]`.
          dtype: dtype of keys and values; None: `compute_dtype`.
          keep_experts: also store the experts that each token takes in the cache.

        Returns:
          Hidden states `[B, T, D]`, and a full cache of T columns.
        """
        config, dtype = self.config, self.compute_dtype if dtype is None else dtype
        positions, segment_ids = (jnp.asarray(x, jnp.int32) for x in (positions, segment_ids))
        length = positions.shape[1]
        # The cache holds a row's keys and values in the original order.
        rows = self._rows(inputs, Segments(segment_ids, positions), balance=False)
        inputs, segments, inputs_of, kind, _ = rows

        def run(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            layer, attributes = xs
            (x, routing), cached = self._block(layer).with_keys_values(
                x, inputs_of(attributes), kind
            )
            cached = jax.tree.map(  # [B, T, K, d] → [B, K, T, d]
                lambda y: to_cache(y[:, :length], dtype).transpose(0, 2, 1, 3), cached
            )
            experts = None
            if keep_experts and routing is not None:
                experts = expert_numbers(routing, config)[:, :length]
            return constrain(x, "rows length hidden"), (*cached, experts)

        x = self._embed(params, inputs, segments.positions, segments.ids, "rows length hidden")
        x, (*stacked, taken) = jax.lax.scan(
            run, x, (self._stacked(params), layer_attributes(config))
        )
        layers = range(config.num_layers)
        # [L, B, K, T, d] → L arrays
        keys, values = (tuple(split(y[layer]) for layer in layers) for y in stacked)
        experts = None if taken is None else tuple(taken[layer] for layer in layers)
        used = jnp.asarray(length, jnp.int32)
        cache = Cache(keys, values, segment_ids, positions, used, experts)
        return self._norm(params, x)[:, :length], cache

    def by_layer(self, params: Params) -> Params:
        """The same parameters with the blocks as a tuple of layers, which `extend` also accepts.

        A loop over tokens then does not slice the stack. See `Backend.decode_weights_by_layer`.
        """
        layers = range(self.config.num_layers)
        stacked = self._stacked(params)
        blocks = tuple(layers_of(stacked, layer) for layer in layers)
        return params | {"blocks": blocks}

    def extend(
        self, params: Params, cache: Cache, inputs: Array, positions: Array, segment_ids: Array
    ) -> tuple[jax.Array, Cache]:
        """One step of decoding: reads T (a few) more tokens of every row into the cache.

        Layers are unrolled, not scanned: each updates its own cache array in place (see
        `models.attention.kv_cache`).

        Args:
          params: as for `apply`, or the result of `by_layer`.
          cache: a cache with at least T free columns.
          inputs: int32 `[B, T]`.
          positions: int32 `[B, T]`.
          segment_ids: int32 `[B, T]`; 0 marks padding, which later tokens never see.

        Returns:
          Hidden states `[B, T, D]` of the new tokens, and the updated cache.
        """
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        segments = write_columns(cache.segment_ids, segment_ids, cache.used, axis=1)
        positions = jnp.asarray(positions, jnp.int32)
        key_positions = write_columns(cache.positions, positions, cache.used, axis=1)
        query, key = Segments(segment_ids, positions), Segments(segments, key_positions)
        mask = MaskSpec(query, key, cached=True)  # T queries, S columns of the cache
        inputs_of = attention_inputs(self.config, mask, matrix=True)
        by_layer, attributes = isinstance(params["blocks"], tuple), layer_attributes(self.config)
        blocks = params["blocks"] if by_layer else self._stacked(params)
        keys, values, experts = list(cache.keys), list(cache.values), cache.experts
        taken: list[jax.Array] = []
        x = self._embed(params, inputs, positions, segment_ids, "rows new hidden")
        for layer in range(self.config.num_layers):
            weights = blocks[layer] if by_layer else layers_of(blocks, layer)
            layer_inputs = inputs_of(layers_of(attributes, layer))
            (x, routing), keys[layer], values[layer] = self._block(weights).extend(
                x, layer_inputs, keys[layer], values[layer], cache.used
            )
            if experts is not None and routing is not None:
                new = expert_numbers(routing, self.config)
                taken.append(write_columns(experts[layer], new, cache.used, axis=1))
            x = constrain(x, "rows new hidden")
        used = cache.used + segment_ids.shape[1]
        experts = None if experts is None else tuple(taken)
        cache = Cache(tuple(keys), tuple(values), segments, key_positions, used, experts)
        return self._norm(params, x), cache

    def head(self, params: Params) -> jax.Array:
        """The output matrix `[D, V]`: the head, or the transposed embedding where tied.

        Adapters of the head are multiplied out.
        """
        if self.config.tie_embeddings:
            matrix = jnp.transpose(params["embed"]["embedding"])
        else:
            matrix = params["head"]["kernel"]
        adapter = adapter_of(self.lora, "lm_head")
        if adapter is None:
            return matrix
        return adapted_matrix(matrix, params["head"], adapter.scales[0])

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The float32 logits `[B, T, V]`, for inspection and single positions, not training."""
        head = self.head(params).astype(hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        return self.finish_logits(logits)

    def finish_logits(self, logits: jax.Array) -> jax.Array:
        """The soft cap of the logits, `c · tanh(logits / c)`, if the model has one."""
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embed(
        self, params: Params, inputs: Array, positions: Array, segment_ids: Array, axes: str,
        noise: EmbeddingNoise | None = None,
    ) -> jax.Array:  # fmt: skip
        """Token ids `[B, T]` → the residual stream `[B, T, D]`, laid out by `axes`."""
        return embed_tokens(
            self.config, self.lora, params["embed"], inputs, positions, segment_ids,
            axes=axes, dtype=self.compute_dtype, noise=noise,
        )  # fmt: skip

    def _stacked(self, params: Params) -> Params:
        """The blocks, `[L, …]` each, in the form for the scan."""
        return with_layer_scales(params["blocks"], self.lora, self.config.num_layers)

    def _block(self, layer: Params) -> Block:
        graphdef, state = abstract_block(self.config, self.lora, self.quantize)
        return nnx.merge(graphdef, with_values(state, layer))

    def _norm(self, params: Params, x: jax.Array) -> jax.Array:
        norm = make_norm(self.config)
        for name, value in params["norm"].items():
            getattr(norm, name)[...] = value
        return norm(x)
