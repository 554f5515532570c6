"""Muon for the matrices between hidden layers, and Adam for all other parameters.

    m ← β m + (1 − β) g u = β m̂ + (1 − β) ĝ                                 Nesterov; ^ is bias
    correction O = NewtonSchulz₅(u) ≈ U Vᵀ,  where u = U Σ Vᵀ update = s · O,   s = rms · √max(in,
    out)   or, with rms None,   √max(1, out / in)

(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale with `rms`: Liu et al.
2025, https://arxiv.org/abs/2502.16982, eq. 4.) With rms = 0.2 the entries of an update have about
the size of AdamW's, so that both can share one learning rate and weight decay.

A stack of layers or experts is orthogonalised matrix by matrix, over its last two axes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from jaxalign.algorithms.matrices import is_hidden_matrix
from jaxalign.algorithms.param_patterns import path_of
from jaxalign.types import Params

_LAST_TWO = optax.contrib.MuonDimensionNumbers(-2, -1)


def scale_by_muon(
    *, momentum: float, rms: float | None, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Muon's updates, before weight decay and learning rate.

    Args:
      momentum: β of Muon.
      rms: root mean square to which the entries of an update are scaled; None: Jordan's scale.
      b1, b2, eps: Adam's, for embeddings, heads, norms and biases.

    Raises:
      ValueError: (when initialised) no parameter is a hidden matrix.
    """
    matrices = optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=_dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: _scale(u, rms) * u, updates)),
    )
    return optax.partition(
        {"muon": matrices, "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps)}, _labels
    )


def _dimensions(updates: Any) -> Any:
    return jax.tree.map(lambda _: _LAST_TWO, updates)


def _scale(update: jax.Array, rms: float | None) -> float:
    fan_in, fan_out = update.shape[-2:]
    if rms is None:
        return math.sqrt(max(1.0, fan_out / fan_in))
    return rms * math.sqrt(max(fan_in, fan_out))


def _labels(params: Params) -> Any:
    def label(path: tuple[Any, ...], leaf: Any) -> str:
        return "muon" if is_hidden_matrix(path, len(leaf.shape)) else "adam"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "muon" not in jax.tree.leaves(labels):
        paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            "optimizer name='muon': no trained parameter is a matrix between hidden layers (a "
            f"kernel or an adapter's factor); there are: {', '.join(paths)}; use name='adamw'"
        )
    return labels
