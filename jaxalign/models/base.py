"""What a model is: its shape as a frozen config, and the two methods algorithms ask for."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax

from jaxalign.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
      theta: base of the geometric frequencies, `theta^(-2i/head_dim)`.
      kind: "default"; "linear" (every frequency divided by `factor`); "llama3" (low frequencies
        divided by `factor`, high ones kept, a smooth ramp between).
      factor: how many times longer the scaled context is.
      low_freq_factor: llama3: wavelengths above `original_max_positions / low_freq_factor` are
        scaled fully.
      high_freq_factor: llama3: wavelengths below `original_max_positions / high_freq_factor` are
        kept.
      original_max_positions: context length before scaling.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if self.kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"rope kind={self.kind!r} is not supported; supported: default, linear, llama3"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a pre-norm decoder of the Llama family.

    Attributes:
      vocab_size: rows of the embedding, V.
      hidden_size: width of the residual stream, D.
      intermediate_size: width inside the MLP, F.
      num_layers: number of blocks, L.
      num_heads: query heads, H.
      num_kv_heads: key and value heads, K; H is a multiple of K (grouped-query attention).
      head_dim: width of a head; H × head_dim need not equal D.
      rope: rotary embedding.
      norm_eps: ε of RMSNorm.
      tie_embeddings: the head is the transposed embedding.
      qkv_bias, out_bias, mlp_bias: which projections carry a bias.
      max_positions: longest context the model was trained for (information; not enforced).
      family: key of `families.FAMILIES`, for export.
      source_config: the `config.json` the model came with, as a JSON string, so that fields we do
        not model survive a round trip; "" for a model made here.
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding wants an even number")


class LanguageModel(Protocol):
    """All that the algorithms ask of a policy; bring your own class if it offers this."""

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
    """All that the algorithms ask of a reward model or critic."""

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
