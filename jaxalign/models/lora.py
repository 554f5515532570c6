"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = xW + α/r · (xA)B.

Only A, B and the named `modules_to_save` are trained. The rest of the base goes to
`TrainState.frozen`, without gradients or optimizer state.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.adapters import (
    LEAVES,
    Adapter,
    adapted_matrix,
    adapter_of,
    column_lengths,
    principal_parts,
)
from jaxalign.models.adapters import without_adapters as without_adapters
from jaxalign.models.base import LoraConfig as LoraConfig
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora_config import LORA_NAMES, chooses
from jaxalign.models.quantized import dequantize as dequantized
from jaxalign.models.quantized import is_quantized, map_quantized
from jaxalign.parallel.sharding import mesh_of, param_shardings
from jaxalign.types import Params

Path = tuple[str, ...]


def add_lora(
    model: Decoder, params: Params, key: jax.Array, config: LoraConfig | None = None
) -> tuple[Decoder, Params, Params]:
    """Adds adapters to a model; initially the adapted model equals the base.

    Args:
      model: a model without adapters.
      params: its parameters.
      key: a PRNG key for the adapters.
      config: the options; None: the defaults.

    Returns:
      (adapted model, trainable parameters: adapters and `modules_to_save`, frozen parameters: the
      rest of the base, with PiSSA minus the part that the adapters take). Pass both to
      `init_state(params, tx, frozen=…)`, or `combine` them to call `model.apply`.

    Raises:
      ValueError: the model has adapters; a target, pattern or module that the model does not have
        (the message lists those it has); a rank above a matrix's rank; options that conflict.
    """
    config = LoraConfig() if config is None else config
    adapters, changed = make_adapters(model, params, key, config)
    adapted = dataclasses.replace(model, lora=config)
    mesh = mesh_of(params)
    if mesh is not None:
        axes, shapes = adapters_of(adapted.axes), adapters_of(adapted.shapes)
        adapters = jax.device_put(adapters, param_shardings(axes, mesh, shapes))
        changed = jax.tree.map(
            lambda x, old: jax.device_put(x, old.sharding), changed, _like(params, changed)
        )
    saved, frozen = split_saved(replaced(params, changed), config)
    return adapted, combine(adapters, saved), frozen


def make_adapters(
    model: Decoder, params: Params, key: jax.Array, config: LoraConfig
) -> tuple[Params, Params]:
    """Makes new adapters for a model.

    Args:
      model: a model without adapters.
      params: its parameters; only DoRA and PiSSA read them.
      key: a PRNG key.
      config: the options.

    Returns:
      (adapters, the base's matrices that change: with PiSSA, the rest of each matrix).

    Raises:
      ValueError: as `add_lora`.
    """
    check_lora(model, config)
    adapted = dataclasses.replace(model, lora=config)
    # jit drops unused computations, so the rest of `init` is never computed.
    adapters = jax.jit(lambda key: adapters_of(adapted.init(key)))(key)
    changed: Params = {}
    matrices = adapted_matrices(model, config)
    if config.dora:  # ‖W‖: of whole matrices, before PiSSA takes its part
        lengths = jax.jit(lambda whole: [_lengths(w) for w in whole])
        whole = [stored_at(params, path) for path in matrices]
        for path, made in zip(matrices, lengths(whole), strict=True):
            leaf_at(adapters, path[:-1])["lora_m"] = made
    if config.init == "pissa":
        split = jax.jit(principal_parts, static_argnames=("adapter", "stacked"))
        for path, adapter in matrices.items():
            if path == ("embed", "embedding"):
                continue  # the embedding is looked up: as in PEFT, it starts as with "gaussian"
            stacked = path[0] == "blocks"
            a, b, rest = split(matrix_of(params, path), adapter=adapter, stacked=stacked)
            leaf_at(adapters, path[:-1]).update(lora_a=a, lora_b=b)
            set_leaf(changed, path, rest)
    return adapters, changed


def sharing_base(config: LoraConfig) -> LoraConfig:
    """Options for more adapters on the same base, such as a critic's; all of it stays frozen."""
    return dataclasses.replace(config, modules_to_save=())


def trained_base(model: Decoder, params: Params, config: LoraConfig) -> Params:
    """The frozen part of a base: without `modules_to_save` and without PiSSA's share.

    Args:
      model: the base, without adapters.
      params: its parameters at the time when adapters were added.
      config: options of the adapters.
    """
    if config.init == "pissa":
        params = replaced(params, make_adapters(model, params, jax.random.key(0), config)[1])
    return split_saved(params, config)[1]


def merge_lora(
    model: Decoder, params: Params, *, dequantize: bool = False
) -> tuple[Decoder, Params]:
    """Merges adapters into the matrices for export: W ← W + s · A·B (DoRA: with trained norms).

    If the head is tied to the embedding, merging an adapter of either one unties them.

    Args:
      model: an adapted model.
      params: base and adapters together (`combine(params, frozen)`), with or without a score head.
      dequantize: for a quantised base, whether to use its rounded values as floats.

    Returns:
      (plain model, plain parameters in the base's dtypes; the sum is computed in the wider dtype).

    Raises:
      ValueError: no adapters, or a quantised base without `dequantize`.
    """
    lora = model.lora
    if lora is None:
        raise ValueError("the model has no adapters to merge")
    if model.quantize is not None:
        if not dequantize:
            raise ValueError(
                f"merging into a base that is quantised ({model.quantize}): its weights were "
                "rounded when it was loaded, and the merged model would keep that rounding. Merge "
                "into the floats: combine these adapters with load_pretrained(source) without "
                "quantize; or take the rounded base, which is the model that was trained, with "
                "dequantize=True"
            )
        model, params = dequantize_base(model, params)
    config, plain = model.config, without_adapters(params)
    matrices = adapted_matrices(model, lora)
    tied = config.tie_embeddings and "score" not in params
    if tied and any(path[0] in ("embed", "head") for path in matrices):
        config = dataclasses.replace(config, tie_embeddings=False)
        set_leaf(plain, ("head", "kernel"), jnp.transpose(params["embed"]["embedding"]))
    for path, adapter in matrices.items():
        if path[0] == "head" and "score" in params:
            continue  # a scorer has no output matrix
        node, matrix = leaf_at(params, path[:-1]), leaf_at(plain, path)
        merged = adapted_matrix(matrix, node, adapter.scale_array(matrix.ndim))
        set_leaf(plain, path, merged.astype(matrix.dtype))
    return dataclasses.replace(model, lora=None, config=config), plain


def adapted_matrices(model: Decoder, config: LoraConfig) -> dict[Path, Adapter]:
    """Path of every matrix with adapters → its adapter, in the order of the parameters.

    The output matrix has the path ("head", "kernel"), even if it is the tied embedding.
    """
    found, layers = {}, model.config.num_layers
    for name, path in matrix_names(model).items():
        adapter = adapter_of(config, name, layers if path[0] == "blocks" else None)
        if adapter is not None:
            found[path] = adapter
    return found


def dequantize_base(model: Decoder, params: Params, dtype: Any = None) -> tuple[Decoder, Params]:
    """A model with its quantised matrices converted to floats.

    Args:
      model: with or without adapters.
      params: its parameters.
      dtype: dtype of these matrices; None: the embedding's dtype.
    """
    dtype = params["embed"]["embedding"].dtype if dtype is None else dtype
    floats = map_quantized(lambda parts: dequantized(parts, dtype), params)
    return dataclasses.replace(model, quantize=None), floats


def matrix_of(params: Params, path: Path) -> Any:
    """The matrix at a path, in floats; the transposed embedding for the output matrix of a tied
    model."""
    stored = stored_at(params, path)
    return dequantized(stored) if is_quantized(stored) else stored


def stored_at(params: Params, path: Path) -> Any:
    """Like `matrix_of`, but without dequantising."""
    if path == ("head", "kernel") and "kernel" not in params.get("head", {}):
        return jnp.transpose(params["embed"]["embedding"])
    return leaf_at(params, path)


def _lengths(stored: Any) -> jax.Array:
    """`column_lengths`; for a quantised matrix one layer at a time."""
    if not is_quantized(stored):
        return column_lengths(stored)
    return jax.lax.map(lambda parts: column_lengths(dequantized(parts)), stored)


def adapters_of(params: Params) -> Params:
    """The adapters among parameters (or their axes, or shapes)."""
    kept = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner = adapters_of(value)
            if inner:
                kept[name] = inner
        elif name in LEAVES:
            kept[name] = value
    return kept


def split_saved(params: Params, config: LoraConfig) -> tuple[Params, Params]:
    """Splits a base's parameters: (those of `modules_to_save`, all others)."""
    if not config.modules_to_save:
        return {}, params
    saved: Params = {}
    frozen: Params = {}
    for path, leaf in leaves_of(params):
        set_leaf(saved if is_saved(path, config) else frozen, path, leaf)
    return saved, frozen


def is_saved(path: Path, config: LoraConfig) -> bool:
    """Whether a leaf belongs to one of `modules_to_save`."""
    name = module_name(path)
    return any(chooses(pattern, name) for pattern in config.modules_to_save)


def replaced(params: Params, changed: Params) -> Params:
    """Parameters with some of their leaves replaced."""
    if not changed:
        return params
    return params | {
        name: replaced(params[name], value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }


def check_lora(model: Decoder, config: LoraConfig, *, fresh: bool = True) -> None:
    """Raises ValueError for options that do not fit a model.

    Args:
      model: a model without adapters.
      config: the options.
      fresh: whether the adapters are new; the ranks of existing adapters are not checked.

    Raises:
      ValueError: see `add_lora`.
    """
    if model.lora is not None:
        raise ValueError("the model already has adapters; merge them first (merge_lora)")
    kind, model = model.quantize, dataclasses.replace(model, quantize=None)
    names, layers = matrix_names(model), model.config.num_layers
    full = [
        name if path[0] != "blocks" else f"layers.{layer}.{name}"
        for name, path in names.items()
        for layer in range(layers if path[0] == "blocks" else 1)
    ]
    # The default targets are the same for all models, but some models lack a gate.
    targets = () if config.targets == LoraConfig().targets else config.targets
    for option, patterns in (
        ("targets", targets),
        ("rank_pattern", tuple(config.rank_pattern)),
        ("alpha_pattern", tuple(config.alpha_pattern)),
    ):
        for pattern in patterns:
            if not any(chooses(pattern, name) for name in full):
                have = ", ".join(
                    f"layers.0.{n}" if p[0] == "blocks" else n for n, p in names.items()
                )
                raise ValueError(
                    f"lora {option}: {pattern!r} is nothing that this model has; it has {have} "
                    f"(layers 0 to {layers - 1})"
                )
    matrices = adapted_matrices(model, config)
    if fresh:
        _check_ranks(model, matrices)
    _check_together(model, config, matrices)
    if kind is not None:
        _check_quantized(names, config, kind)
    modules = dict.fromkeys(module_name(path) for path, _ in leaves_of(model.shapes))
    for pattern in config.modules_to_save:
        if pattern != "score" and not any(chooses(pattern, name) for name in modules):
            raise ValueError(
                f"lora modules_to_save: {pattern!r} is no module of this model; it has "
                f"{', '.join(modules)}"
            )


def _check_ranks(model: Decoder, matrices: dict[Path, Adapter]) -> None:
    for path, adapter in matrices.items():
        if path[0] == "head":
            sizes = model.config.hidden_size, model.config.vocab_size
        else:
            sizes = matrix_of(model.shapes, path).shape[-2:]
        if adapter.rank > min(sizes):
            raise ValueError(
                f"lora rank={adapter.rank} is above that of {module_name(path)}, a matrix of "
                f"{sizes[0]} x {sizes[1]}; wanted at most {min(sizes)}, for this matrix alone by "
                "rank_pattern"
            )


def _check_together(model: Decoder, config: LoraConfig, matrices: dict[Path, Adapter]) -> None:
    for path, adapter in matrices.items():
        name = module_name(path)
        if is_saved(path, config):
            raise ValueError(
                f"lora modules_to_save={config.modules_to_save}: {name} has adapters too; "
                "remove it from one of the two"
            )
        if config.dora and model.config.num_experts and path[:2] == ("blocks", "mlp"):
            raise ValueError(
                f"lora dora=true does not adapt experts, which {name} is; name targets of "
                "attention only"
            )
        if config.dora and 0 in adapter.ranks:
            raise ValueError(
                f"lora dora=true with targets that choose {name} in some layers only: layers are "
                "stacked, so its lengths would be trained in all of them; name whole projections"
            )
        if config.init == "pissa":
            _check_principal(model, path)


def _check_quantized(names: dict[str, Path], config: LoraConfig, kind: str) -> None:
    if config.init == "pissa":
        raise ValueError(
            f"lora init=pissa with a quantised base ({kind}): it changes the base, whose floats "
            "are gone; take init=gaussian or peft"
        )
    for name, path in names.items():
        if path[0] == "blocks" and is_saved(path, config):
            raise ValueError(
                f"lora modules_to_save={config.modules_to_save}: {name} is quantised ({kind}) and "
                "cannot be trained whole; name it among the targets, or load a base in floats"
            )


def _check_principal(model: Decoder, path: Path) -> None:
    if path == ("head", "kernel") and model.config.tie_embeddings:
        raise ValueError(
            "lora init=pissa with the target lm_head, which is the embedding here: what PiSSA "
            "leaves of it would be looked up too; leave lm_head out or take init=gaussian"
        )
    if model.config.num_experts and path[:2] == ("blocks", "mlp"):
        raise ValueError(
            f"lora init=pissa does not adapt experts, which {module_name(path)} is; name targets "
            "of attention only, or take init=gaussian"
        )


def matrix_names(model: Decoder) -> dict[str, Path]:
    """Name → path, for everything that can have adapters."""
    plain = dataclasses.replace(model, lora=None, quantize=None)
    found: dict[str, Path] = {"embed": ("embed", "embedding")}
    for path, _ in leaves_of(plain.shapes):
        if path[0] == "blocks" and path[-1] == "kernel" and path[-2] in LORA_NAMES:
            found[".".join(path[1:-1])] = path
    return found | {"lm_head": ("head", "kernel")}


def module_name(path: Path) -> str:
    """The name of a leaf's module, as `modules_to_save` has it."""
    names = path[:-1]
    return ".".join(("lm_head", *names[1:]) if names[0] == "head" else names)


def leaves_of(tree: Params, path: Path = ()) -> list[tuple[Path, Any]]:
    """All leaves of a nested dictionary with their paths."""
    found = []
    for name, value in tree.items():
        inner = isinstance(value, dict)
        found += leaves_of(value, (*path, name)) if inner else [((*path, name), value)]
    return found


def _like(params: Params, part: Params) -> Params:
    return {
        name: _like(params[name], value) if isinstance(value, dict) else params[name]
        for name, value in part.items()
    }


def leaf_at(tree: Params, path: Path) -> Any:
    """The value at a path."""
    for name in path:
        tree = tree[name]
    return tree


def set_leaf(tree: Params, path: Path, value: Any) -> None:
    """Sets the value at a path; makes missing dictionaries."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
