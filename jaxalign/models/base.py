"""A model's shape as a frozen config, and the methods that algorithms need of a model."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxalign.models.lora_config import LORA_TARGETS as LORA_TARGETS
from jaxalign.models.lora_config import LoraConfig as LoraConfig
from jaxalign.models.ops import take_columns
from jaxalign.types import Array, EmbeddingNoise, LowerStates, Params, TokenBatch, Weighted

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

NORMS = ("rms", "rms_offset", "layer")

NORM_PLACES = ("before", "after", "both")

QK_NORMS = ("none", "head", "width")

GENERATION = "_generation_config"
"""Key of `source_config` for the source's `generation_config.json`, if it had one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
      theta: base of the geometric frequencies, `theta^(-2i/head_dim)`.
      kind: one of `ROPE_KINDS`; see `jaxalign.models.rope`.
      fraction: the fraction of each head (its first dimensions) that is rotated; the rest has no
        position.
      factor: how many times longer the scaled context is.
      low_freq_factor: llama3: wavelengths above `original_max_positions / low_freq_factor` are
        scaled fully.
      high_freq_factor: llama3: wavelengths below `original_max_positions / high_freq_factor` are
        kept.
      original_max_positions: context length before scaling.
      beta_fast: yarn: frequencies that turn more often than this in the original context are kept.
      beta_slow: yarn: frequencies that turn less often than this are divided by `factor`.
      truncate: yarn: round the ends of the ramp between the two to whole dimensions.
      attention_factor: yarn, longrope: multiplies queries and keys; None: derived from `factor` as
        in the method's paper (yarn: also from `mscale` and `mscale_all_dim`, if both are given).
      mscale: yarn, see `attention_factor`.
      mscale_all_dim: yarn, see `attention_factor`.
      short_factors: longrope: divisor of each frequency in documents of at most
        `original_max_positions`.
      long_factors: longrope: the same in longer documents.
    """

    theta: float = 10000.0
    kind: str = "default"
    fraction: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"rope kind={self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"rope fraction={self.fraction}: wanted a value in (0, 1]")

    def width(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder. The defaults are a plain Llama; a family sets its differences.

    Attributes:
      vocab_size: rows of the embedding, V.
      hidden_size: width of the residual stream, D.
      intermediate_size: width inside the MLP, or inside each expert, F.
      num_layers: number of blocks, L.
      num_heads: query heads, H.
      num_kv_heads: key and value heads, K; H is a multiple of K (grouped-query attention).
      head_dim: width of a head; H × head_dim need not equal D.
      rope: rotary embedding.
      norm_eps: ε of the norms.
      tie_embeddings: the head is the transposed embedding.
      qkv_bias, out_bias, mlp_bias: which projections have a bias.
      max_positions: the longest context the model was trained for. It is the number of learned
        positions, and the length at which "dynamic" rope starts to scale; otherwise it is not
        enforced.
      family: key of `families.FAMILIES`, for export.
      source_config: the model's original `config.json` as a JSON string, so that fields we do not
        model survive a round trip; "" for a model made here.
      activation: the MLP's activation: "silu"; "gelu" (exact); "gelu_tanh" (the tanh
        approximation).
      gated_mlp: `down(act(gate(x)) · up(x))`; False: `down(act(up(x)))`.
      norm: "rms"; "rms_offset" (the stored scale is added to 1); "layer" (LayerNorm with bias).
      norm_place: where attention and MLP are normalised: "before" (their input), "after" (their
        output, before it is added to the residual stream), "both".
      qk_norm: norm of queries and keys before rotation: "none"; "head" (each head by itself);
        "width" (all heads together).
      learned_positions: learned position embeddings are added to the token embeddings; no rotation.
      local_rope: rotary embedding of the layers with a window; None: `rope`.
      rope_layers: which layers rotate; () for all.
      window: a token attends to itself and the `window` − 1 tokens before it; None: to all earlier
        tokens.
      window_layers: the layers with the window; () for all.
      query_scale: multiplies the attention scores; None: 1/√head_dim.
      query_scale_by_layer: also divides them by the layer's number, from 1.
      attention_softcap: c in `c · tanh(scores / c)`; None: off.
      logit_softcap: the same for the logits.
      embed_scale: multiplies the token embeddings.
      num_experts: E, the experts per layer; 0: a single MLP.
      experts_per_token: k, how many experts a token takes.
      normalize_routing: the k weights of a token are scaled to sum to 1.
      router_aux_coef: weight of the load-balancing loss in training; 0: no such loss.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048
    family: str = "llama"
    source_config: str = ""
    activation: str = "silu"
    gated_mlp: bool = True
    norm: str = "rms"
    norm_place: str = "before"
    qk_norm: str = "none"
    learned_positions: bool = False
    local_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] = ()
    window: int | None = None
    window_layers: tuple[bool, ...] = ()
    query_scale: float | None = None
    query_scale_by_layer: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_routing: bool = True
    router_aux_coef: float = 0.0

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: wanted a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        self._check_choices()
        self._check_layers()
        for name in ("window", "query_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: wanted a positive number, or None")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token}: wanted 1 to "
                f"num_experts={self.num_experts}"
            )
        if self.num_experts and (self.mlp_bias or not self.gated_mlp):
            raise ValueError("experts are gated and have no biases; got mlp_bias or not gated_mlp")

    @property
    def listed_stops(self) -> tuple[int, ...]:
        """The stop ids in the model's original generation config; () if it had none."""
        source = json.loads(self.source_config) if self.source_config else {}
        listed = source.get(GENERATION, source).get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        return tuple(i for i in listed if isinstance(i, int) and 0 <= i < self.vocab_size)

    def _check_choices(self) -> None:
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("norm_place", NORM_PLACES),
            ("qk_norm", QK_NORMS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: wanted one of {', '.join(choices)}"
                )
        ropes = [] if self.learned_positions else [self.rope, self.local_rope or self.rope]
        for rope in ropes:
            width = rope.width(self.head_dim)
            if width % 2 or not width:
                raise ValueError(
                    f"head_dim={self.head_dim}: rotary embedding wants an even number of rotated "
                    f"dimensions, got {width}"
                )
            for factors in (rope.short_factors, rope.long_factors):
                if rope.kind == "longrope" and len(factors) != width // 2:
                    raise ValueError(
                        f"longrope has {len(factors)} factors for {width // 2} frequencies"
                    )

    def _check_layers(self) -> None:
        for name in ("rope_layers", "window_layers"):
            layers = getattr(self, name)
            if layers and len(layers) != self.num_layers:
                raise ValueError(f"{name} has {len(layers)} entries for {self.num_layers} layers")
        if self.window is None and (self.window_layers or self.local_rope is not None):
            raise ValueError("window_layers and local_rope go with a window; got window=None")


class LanguageModel(Protocol):
    """What the algorithms need from a policy; any class with these methods works."""

    def apply(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> jax.Array:
        """Token ids `[B, T]` → hidden states `[B, T, D]` after the final norm."""
        ...

    def head(self, params: Params) -> jax.Array:
        """The output matrix `[D, V]`."""
        ...


class ScalarModel(Protocol):
    """What the algorithms need from a reward model or critic."""

    def apply(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> jax.Array:
        """Token ids `[B, T]` → hidden states `[B, T, D]`."""
        ...

    def scores(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Hidden states `[B, T, D]` → float32 scalars `[B, T]`."""
        ...


def read(
    model: Any, params: Params, tokens: TokenBatch, columns: Array | None = None
) -> tuple[jax.Array, dict[str, Weighted]]:
    """Runs a model over a batch: what algorithms call instead of `model.apply`.

    Args:
      model: a `LanguageModel` or `ScalarModel`. It may offer more than those protocols require:
        `apply(…, branch_ids=…)`, `apply(…, noise=…)`, `apply(…, experts=…)` and `apply(…,
        lower=…)`, needed only for batches with branches, noise, experts or lower states;
        `apply(…, columns=…)`, which may save work; and `extra_terms` with `apply_with_losses`, if
        it has its own loss terms.
      params: its parameters.
      tokens: the batch.
      columns: int32 `[B, Q]`, the columns whose hidden states are read; None: all.

    Returns:
      (hidden states `[B, T, D]`, or `[B, Q, D]`; the model's own loss terms by name, already
      scaled: `router` for a mixture of experts, else none). `read_counts` gives the terms' weights.

    Raises:
      ValueError: a `loss_mask` of floats.
    """
    if jnp.issubdtype(jnp.result_type(tokens.loss_mask), jnp.floating):
        raise ValueError(
            f"loss_mask: got {jnp.result_type(tokens.loss_mask)}, wanted bool, True where a token "
            "is trained; weights of tokens go into TokenBatch.weights"
        )
    more: dict[str, Any] = {}
    if tokens.branch_ids is not None:
        more["branch_ids"] = tokens.branch_ids
    if isinstance(tokens.noise, EmbeddingNoise):
        more["noise"] = tokens.noise
    # Placeholder batches have an array in every field; that does not mean replay.
    if tokens.experts is not None and jnp.ndim(tokens.experts) == 4:
        more["experts"] = tokens.experts
    if isinstance(tokens.lower, LowerStates):
        more["lower"] = tokens.lower
    has_terms = bool(getattr(model, "extra_terms", ()))
    run = model.apply_with_losses if has_terms else model.apply
    itself = columns is not None and "columns" in inspect.signature(run).parameters
    if itself:
        more["columns"] = columns
    out = run(params, tokens.inputs, tokens.positions, tokens.segment_ids, **more)
    hidden, terms = out if has_terms else (out, {})
    if columns is not None and not itself:
        hidden = take_columns(hidden, columns)
    return hidden, terms


def read_counts(model: Any, tokens: TokenBatch) -> dict[str, jax.Array]:
    """Weights of the loss terms that `read` returns: all tokens except padding, trained or not."""
    count = jnp.sum(jnp.asarray(tokens.segment_ids) > 0, dtype=jnp.float32)
    return dict.fromkeys(getattr(model, "extra_terms", ()), count)


def combine(params: Params, frozen: Params) -> Any:
    """Merges two nested dicts with disjoint leaves: trainable and frozen parameters.

    Raises:
      ValueError: the same leaf is in both.
    """
    if not frozen:
        return params
    merged = dict(frozen)
    for name, value in params.items():
        if name not in merged:
            merged[name] = value
        elif isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = combine(value, merged[name])
        else:
            raise ValueError(f"parameter {name!r} is both trainable and frozen")
    return merged
