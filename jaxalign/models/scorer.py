"""Models with a scalar head: reward models and critics, and how their scores are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import last_index
from jaxalign.models.base import DecoderConfig, ScalarModel, read
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.sharding import mesh_of, param_shardings
from jaxalign.types import Array, LowerStates, Params, TokenBatch, Weighted


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A decoder with a scalar head instead of a vocabulary: reward model and critic.

    Attributes:
      base: the decoder; its output head is not used and not in the parameters.
      attributes: names of the head's A outputs, if it predicts several grades ("helpfulness",
        "verbosity", …); empty for an ordinary reward model with a single score.
    """

    base: Decoder
    attributes: tuple[str, ...] = ()

    def __post_init__(self):
        if len(set(self.attributes)) < len(self.attributes) or "" in self.attributes:
            raise ValueError(f"attributes={list(self.attributes)}: wanted names, each of them once")

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.base.config

    @property
    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        shapes = {k: v for k, v in self.base.shapes.items() if k != "head"}
        width = max(1, len(self.attributes))
        kernel = jax.ShapeDtypeStruct((self.config.hidden_size, width), jnp.float32)
        return shapes | {"score": {"kernel": kernel}}

    @property
    def axes(self) -> Params:
        """The parameter tree with the logical axes of each leaf."""
        axes = {k: v for k, v in self.base.axes.items() if k != "head"}
        return axes | {"score": {"kernel": "embed scalar"}}

    def apply(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
        columns: Array | None = None,
        lower: LowerStates | None = None,
    ) -> jax.Array:
        """Hidden states `[B, T, D]`, or of some columns `[B, Q, D]`, as `Decoder.apply`."""
        rows = (inputs, positions, segment_ids, branch_ids)
        return self.base.apply(params, *rows, columns=columns, lower=lower)

    @property
    def frozen_layers(self) -> int:
        """As `Decoder.frozen_layers`."""
        return self.base.frozen_layers

    @property
    def extra_terms(self) -> tuple[str, ...]:
        """As `Decoder.extra_terms`."""
        return self.base.extra_terms

    def apply_with_losses(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
    ) -> tuple[jax.Array, dict[str, Weighted]]:
        """As `Decoder.apply_with_losses`."""
        return self.base.apply_with_losses(params, inputs, positions, segment_ids, branch_ids)

    def outputs(self, params: Params, hidden: jax.Array) -> jax.Array:
        """All outputs at every position: `hidden · score`, float32 `[B, T, A]` (A = 1 without
        attributes)."""
        kernel = params["score"]["kernel"].astype(jnp.float32)
        return jnp.einsum("btd,do->bto", hidden.astype(jnp.float32), kernel)

    def scores(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The scalar at every position: `hidden · score`, float32 `[B, T]`.

        Raises:
          ValueError: there are several attributes, so no single scalar.
        """
        if len(self.attributes) > 1:
            raise ValueError(
                f"a reward model with the attributes {', '.join(self.attributes)} has no single "
                "score; say how much each counts (weigh_attributes; reward_weights in a config)"
            )
        return self.outputs(params, hidden)[..., 0]


def with_scalar_head(
    model: Decoder, params: Params, key: jax.Array, attributes: tuple[str, ...] = ()
) -> tuple[Scorer, Params]:
    """Puts a fresh scalar head on a language model: the start of a reward model or critic.

    The head is N(0, 1/(D + 1)) without bias (Stiennon et al. 2020; Huang et al. 2024), so that
    initial scores are of order one. An untied vocabulary head is dropped.

    Args:
      model: the language model.
      params: its parameters; shared, not copied.
      key: a PRNG key for the head.
      attributes: names of A outputs; none for a single score.

    Returns:
      (scorer, parameters with `score/kernel` `[D, 1]`, or `[D, A]`).
    """
    width = model.config.hidden_size
    scorer, mesh = Scorer(model, attributes), mesh_of(params)
    shape = scorer.shapes["score"]["kernel"].shape
    kernel = jax.random.normal(key, shape, jnp.float32) / math.sqrt(width + 1)
    if mesh is not None:
        layout = param_shardings(scorer.axes["score"], mesh, scorer.shapes["score"])
        kernel = jax.device_put(kernel, layout["kernel"])
    kept = {k: v for k, v in params.items() if k != "head"}
    return scorer, kept | {"score": {"kernel": kernel}}


def weigh_attributes(
    scorer: Scorer, params: Params, weights: Mapping[str, float]
) -> tuple[Scorer, Params]:
    """A reward model whose single score is a weighted sum of another's attributes.

    The head is linear, so the sum is also a head: `hidden · (score · w)`. The result is an ordinary
    reward model, for PPO, best-of-n and export.

    Args:
      scorer: a reward model with attributes.
      params: its parameters; all except the head are shared, not copied.
      weights: attribute → weight; attributes not named have weight 0.

    Returns:
      (scorer without attributes, parameters with `score/kernel` `[D, 1]`).

    Raises:
      ValueError: no attributes, no weights, or a name that is not an attribute.
    """
    if not scorer.attributes:
        raise ValueError(
            f"reward weights {dict(weights)}: the reward model has one score and no attributes to "
            "weigh; leave them out"
        )
    unknown = [name for name in weights if name not in scorer.attributes]
    if unknown or not any(weights.values()):
        raise ValueError(
            f"reward weights {dict(weights)}: wanted a number for one or more of "
            f"{', '.join(scorer.attributes)}" + (f", got {', '.join(unknown)}" if unknown else "")
        )
    column = jnp.array([[weights.get(name, 0.0)] for name in scorer.attributes], jnp.float32)
    kernel = params["score"]["kernel"]
    # Full float32 products, because a TPU would round to bfloat16.
    one = jnp.matmul(kernel.astype(jnp.float32), column, precision="highest").astype(kernel.dtype)
    return dataclasses.replace(scorer, attributes=()), params | {"score": {"kernel": one}}


def pooled_scores(
    scorer: ScalarModel, params: Params, tokens: TokenBatch, count: int | None = None
) -> jax.Array:
    """The scalar at the last token of each sequence, the usual score of a reward model.

    Args:
      scorer: reward model.
      params: its parameters.
      tokens: `[B, T]`; padded on either side or packed.
      count: S, the largest number of sequences a row holds; None when each row is one sequence.

    Returns:
      float32 `[B]`, or `[B, S]` with `count`; meaningless finite values where there is no sequence.
    """
    last = last_index(tokens.segment_ids, 1 if count is None else count)
    hidden, _ = read(scorer, params, tokens, last)
    pooled = scorer.scores(params, hidden)
    return pooled[:, 0] if count is None else pooled
