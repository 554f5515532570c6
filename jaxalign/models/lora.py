"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = xW + α/r · (xA)B.

Only A and B are trained; the base goes to `TrainState.frozen`, without optimizer state.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxalign.models.base import LoraConfig
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.sharding import mesh_of, param_shardings
from jaxalign.types import Params


def add_lora(
    model: Decoder, params: Params, key: jax.Array, config: LoraConfig | None = None
) -> tuple[Decoder, Params, Params]:
    """Adds adapters to a model; the adapted model starts equal to the base (B = 0).

    Returns:
      (adapted model, trainable parameters: adapters only, frozen parameters: the base). Pass both
      to `init_state(params, tx, frozen=…)`, or `combine` them to call `model.apply`.
    """
    config = LoraConfig() if config is None else config
    if model.lora is not None:
        raise ValueError("the model already has adapters; merge them first (merge_lora)")
    adapted = dataclasses.replace(model, lora=config)
    # jit drops what its result does not need: the rest of `init` is never computed.
    adapters = jax.jit(lambda key: _adapters(adapted.init(key)))(key)
    mesh = mesh_of(params)
    if mesh is not None:
        axes, shapes = _adapters(adapted.axes), _adapters(adapted.shapes)
        adapters = jax.device_put(adapters, param_shardings(axes, mesh, shapes))
    return adapted, adapters, params


def merge_lora(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """Folds adapters into the kernels: W ← W + α/r · A·B, for export.

    Args:
      model: an adapted model.
      params: base and adapters together (`combine(params, frozen)`).

    Returns:
      (plain model, plain parameters in the base's dtypes; the sum is computed in the wider dtype).
    """
    if model.lora is None:
        raise ValueError("the model has no adapters to merge")
    scale = model.lora.alpha / model.lora.rank

    def fold(node: Params) -> Params:
        if not isinstance(node, dict):
            return node
        plain = {k: fold(v) for k, v in node.items() if k not in ("lora_a", "lora_b")}
        if "lora_a" in node:
            kernel = node["kernel"]
            merged = kernel + scale * (node["lora_a"] @ node["lora_b"])
            plain["kernel"] = merged.astype(kernel.dtype)
        return plain

    return dataclasses.replace(model, lora=None), fold(params)


def _adapters(node: Params) -> Params:
    kept = {}
    for name, value in node.items():
        if isinstance(value, dict):
            inner = _adapters(value)
            if inner:
                kept[name] = inner
        elif name in ("lora_a", "lora_b"):
            kept[name] = value
    return kept
