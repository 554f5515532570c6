"""A copy of the weights in fewer bits, to sample with.

Decoding a token reads every weight once. Where that bounds its time, weights of half or a quarter
of the bytes give up to twice or four times the tokens. The sampler then is not quite the policy:
`ppo.prepare` measures by how much (`logprobs/mean_difference`, in nats a token), and trains on the
policy's own log-probabilities.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxalign.models.decoder import Decoder
from jaxalign.models.quantized import is_quantized, map_floats, quantize
from jaxalign.parallel.sharding import mesh_of, use_mesh
from jaxalign.types import Params

WEIGHTS = ("bfloat16", "int8")
"""Kinds of copies. "bfloat16": all weights; with a compute dtype of bfloat16 nothing changes, since
products round them anyway. "int8": the projections of all blocks, with a scale for each output."""


def sampling_weights(model: Decoder, params: Params, kind: str | None) -> tuple[Decoder, Params]:
    """The model and the weights to sample with.

    Args:
      model: the language model.
      params: its parameters.
      kind: one of `WEIGHTS`; None: the weights as they are.

    Raises:
      ValueError: an unknown kind, or "int8" for a base that is already kept in 4 or 8 bits.
    """
    if kind is None:
        return model, params
    model = sampling_model(model, kind)
    with use_mesh(mesh_of(params)):
        return model, convert(model, params, kind)


def sampling_model(model: Decoder, kind: str) -> Decoder:
    """The model of `sampling_weights`; it raises what that raises."""
    if kind not in WEIGHTS:
        raise ValueError(f"sampling_weights={kind!r}: wanted one of {', '.join(WEIGHTS)}, or null")
    if kind != "int8":
        return model
    if model.quantize is not None:
        raise ValueError(
            f"sampling_weights='int8' with a base that is kept as {model.quantize}: its weights "
            "are in fewer bits already; leave sampling_weights out"
        )
    return dataclasses.replace(model, quantize=kind)


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def convert(model: Decoder, params: Params, kind: str) -> Params:
    """The program of `sampling_weights`, for the model that it returns."""
    if kind == "bfloat16":
        return map_floats(_narrow, params)

    def walk(params: Params, shapes: Params) -> Params:
        return {
            name: quantize(value, kind)
            if is_quantized(shapes[name])
            else walk(value, shapes[name])
            if isinstance(value, dict)
            else value
            for name, value in params.items()
        }

    return walk(params, model.shapes)


def _narrow(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
