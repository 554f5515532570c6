"""Loops over stacked layers, and what their backward pass keeps.

The weights of all layers are stacked, `[L, …]` each. A loop over all of them is one `lax.scan`. A
loop over some of them takes each layer out of the whole stack: a slice of the stack would be a copy
of its weights. Unrolled layers are slices, which are no copies there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.backend import backend
from jaxalign.models.base import DecoderConfig
from jaxalign.parallel.sharding import axis_shards

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
"""What the backward pass keeps of a block: everything; results of matrix products; the block's
input; the block's input, in the host's memory."""


def recomputed(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The function, of whose values the backward pass keeps what `REMAT[remat]` says."""
    policy = REMAT[remat]
    if policy is None:
        return function
    # Inside a scan XLA cannot merge the recomputation with the forward pass.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def layers_of(stacked: Any, which: int | slice) -> Any:
    """One layer, or several, of a pytree of arrays `[L, …]`."""
    return jax.tree.map(lambda x: x[which], stacked)


def run_some(
    block: Callable[[Any, jax.Array], jax.Array],
    stacked: Any,
    x: jax.Array,
    first: int,
    last: int,
    *,
    remat: str,
) -> jax.Array:
    """Runs the layers `first` to `last` − 1.

    Args:
      block: (one layer of `stacked`, `[B, T, D]`) → `[B, T, D]`.
      stacked: pytree of arrays `[L, …]`.
      x: `[B, T, D]`.
      first, last: the range of layers.
      remat: key of `REMAT`.
    """
    if jax.tree.leaves(stacked)[0].shape[0] <= backend().unrolled_layers:
        # Not in a loop, a slice of the stack is no copy.
        for layer in range(first, last):
            x = recomputed(block, remat)(layers_of(stacked, layer), x)
        return x

    def numbered(stacked: Any, number: jax.Array, x: jax.Array) -> jax.Array:
        # Taken inside the checkpoint, which keeps the stack for the backward pass, and no layer.
        layer = jax.tree.map(
            lambda y: jax.lax.dynamic_index_in_dim(y, number, keepdims=False), stacked
        )
        return block(layer, x)

    policy = REMAT[remat] or _all_but_slices
    run = jax.checkpoint(numbered, policy=policy, prevent_cse=False)
    numbers = jnp.arange(first, last)
    return jax.lax.scan(lambda x, n: (run(stacked, n, x), None), x, numbers)[0]


def _all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """What `remat: none` keeps of a layer out of the stack: everything except its weights."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def saves_columns(config: DecoderConfig, kind: str, length: int, columns: int | None) -> bool:
    """Whether the last layer is computed at so many of a row's columns only.

    Each column left out saves about 10·D² multiplications. But queries of any columns get all T
    keys, where whole rows skip half: Q·T − T²/2 pairs more, of 2·D multiplications each.
    """
    if columns is None or config.num_experts or kind != "xla" or axis_shards("length") > 1:
        return False
    saved = 5 * config.hidden_size * (length - columns)
    return saved > max(0, columns * length - length**2 // 2)
