"""Merges adapters trained on a quantised base into floats, at the end of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxalign.hf import load_pretrained
from jaxalign.hf.peft_write import whole_array
from jaxalign.models.lora import dequantize_base
from jaxalign.models.quantized import is_quantized
from jaxalign.models.scorer import Scorer
from jaxalign.parallel import distributed
from jaxalign.parallel.host_memory import computing_on_host
from jaxalign.run.config.base import ModelConfig
from jaxalign.run.export import say_floats, whole_model
from jaxalign.types import Params


def whole_floats(model: Any, params: Params, config: ModelConfig) -> tuple[Any, Params]:
    """A trained model without adapters, in floats.

    With a quantised base, the adapters are merged into the floats of `model.source`, which are read
    again into host memory because the device may not have room. If the source is gone, they are
    merged into the quantised base.

    Args:
      model: a `Decoder` or `Scorer`, with adapters or without.
      params: all of its parameters.
      config: the config of the model it started from.

    Returns:
      (plain model, parameters); in host memory, on one device, if the base was quantised.
    """
    decoder = model.base if isinstance(model, Scorer) else model
    if decoder.quantize is None:
        return whole_model(model, params)
    with computing_on_host():
        try:
            _, base = load_pretrained(config.source, dtype=config.dtype)
        except (ValueError, OSError) as error:
            if distributed.is_main():
                print(
                    f"model.source={config.source!r} cannot be read again ({error}): adapters are "
                    f"merged into the {decoder.quantize} base, whose rounding stays in the weights",
                    flush=True,
                )
            floats, params = dequantize_base(decoder, _on_host(params), config.dtype)
        else:
            say_floats(config)
            floats = dataclasses.replace(decoder, quantize=None)
            params = _on_host(params, base)
        whole = dataclasses.replace(model, base=floats) if isinstance(model, Scorer) else floats
        return whole_model(whole, params)


def _on_host(params: Params, base: Params | None = None) -> Params:
    """Parameters in host memory, with quantised matrices replaced by another base's."""
    result = {}
    for name, value in params.items():
        if base is not None and is_quantized(value):
            result[name] = base[name]
        elif isinstance(value, dict):
            result[name] = _on_host(value, None if base is None else base.get(name, {}))
        else:
            result[name] = jnp.asarray(whole_array(value))
    return result
