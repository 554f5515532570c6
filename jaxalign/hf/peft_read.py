"""Reads PEFT adapters: turns its tensors into adapters of our matrices, sharded like the base."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.hf import families
from jaxalign.hf.families import Leaf
from jaxalign.hf.peft_config import WEIGHTS, is_target, lora_config, read_config, scale_of
from jaxalign.hf.peft_modules import (
    Module,
    Slot,
    all_leaves,
    get,
    modules_of,
    put,
    tensor_positions,
)
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import (
    adapters_of,
    check_lora,
    leaf_at,
    make_adapters,
    module_name,
    replaced,
)
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.sharding import mesh_of, param_shardings
from jaxalign.types import Params

_PREFIX = "base_model.model."

PART = re.compile(
    r"(?P<module>.+)\.(?:lora_|lora_embedding_|lora_magnitude_)(?P<part>A|B|vector)"
    r"(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
"""A tensor name of an adapter, which may contain the adapter's name."""


class Factors(NamedTuple):
    """The adapter of a matrix in one layer.

    Attributes:
      a: `[in, r]`.
      b: `[r, out]`.
      m: DoRA's magnitudes `[out]`, or None.
      scale: the factor of A·B.
    """

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    scale: float


class Adapted(NamedTuple):
    """An adapter on its base.

    Attributes:
      model: with adapters; a scorer if the adapter has a score head.
      trained: the adapters, and the modules that the file holds whole.
      frozen: the rest of the base.
    """

    model: Decoder | Scorer
    trained: Params
    frozen: Params


def read_adapter(model: Decoder | Scorer, params: Params, folder: pathlib.Path) -> Adapted:
    """Puts the adapter of a folder on its base; see `jaxalign.hf.peft.load_adapter`."""
    return put_adapter(model, params, folder, read_config(folder), read_tensors(folder))


def put_adapter(
    model: Decoder | Scorer,
    params: Params,
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> Adapted:
    """Puts an adapter on its base.

    Args:
      model: the base.
      params: its parameters.
      folder: the adapter's origin, for messages.
      config: `adapter_config.json`.
      tensors: PEFT's tensors, under names without the prefix.

    Raises:
      ValueError: as `jaxalign.hf.peft.load_adapter`.
    """
    adapters = {k: v for k, v in tensors.items() if PART.fullmatch(k)}
    whole = {k: v for k, v in tensors.items() if k not in adapters}
    model, params, saved = _with_whole(folder, model, params, whole)
    decoder = model.base if isinstance(model, Scorer) else model
    modules = modules_of(decoder)
    found = _factors(folder, config, modules, adapters)
    slots = [slot for module in modules.values() for slot in module.slots]
    names = dict.fromkeys(module_name(tuple(path.split("/"))) for path in saved)
    lora = lora_config(
        config,
        {slot: (factors.b.shape[0], factors.scale) for slot, factors in found.items()},
        slots,
        [name for name in names if name != "score"],
    )
    try:
        check_lora(decoder, lora, fresh=False)
        if lora.init == "pissa":
            _check_unfused(modules, found)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    adapted = dataclasses.replace(decoder, lora=lora)
    stacked = _stack(found, adapters_of(adapted.shapes))
    trained = _place(stacked, adapters_of(adapted.axes), params)
    if lora.init == "pissa":
        key = jax.random.key(0)
        params = replaced(params, make_adapters(decoder, params, key, lora)[1])
    kept: Params = {}
    for path, leaf in families.flatten(params).items():
        put(trained if path in saved else kept, path, leaf)
    result = dataclasses.replace(model, base=adapted) if isinstance(model, Scorer) else adapted
    return Adapted(result, trained, kept)


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter's folder, under names without the prefix."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ValueError(
            f"{path} does not exist"
            + ("; adapter_model.bin is a pickle, which is never read" if pickled else "")
            + "; save the adapter by PEFT (save_pretrained) with safetensors"
        )
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    return {name.removeprefix(_PREFIX): value for name, value in loaded.items()}


# --- A and B -------------------------------------------------------------------------------------


def _factors(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    modules: Mapping[str, Module],
    tensors: Mapping[str, np.ndarray],
) -> dict[Slot, Factors]:
    """The adapter of each matrix that has one."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        assert match is not None
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    for name in parts:
        if name not in modules:
            raise ValueError(
                f"{folder}: the adapter does not fit the base: {name} is no module of it that can "
                f"have adapters; it has {', '.join(list(modules)[:8])}, …; give the base that the "
                "adapter was made for"
            )
    lacking = [name for name in modules if name not in parts and is_target(config, name)]
    if lacking:
        raise ValueError(
            f"{folder}: the adapter does not fit the base: it has nothing for {lacking[0]}, which "
            "its target_modules choose; give the base that the adapter was made for"
        )
    if not parts:
        raise ValueError(f"{folder} holds no adapters (…lora_A…, …lora_B…)")
    dora = bool(config.get("use_dora"))
    found: dict[Slot, Factors] = {}
    for name, tensors_of in parts.items():
        module = modules[name]
        _check_shapes(folder, module, tensors_of, dora=dora)
        rank = tensors_of["A"].shape[0]
        whole = Factors(
            tensors_of["A"].T,
            tensors_of["B"].T,
            tensors_of["vector"].reshape(-1) if dora else None,
            scale_of(config, name, rank),
        )
        found |= _split(module, whole)
    return _without_unused(modules, found)


def _check_shapes(
    folder: pathlib.Path, module: Module, tensors: Mapping[str, np.ndarray], *, dora: bool
) -> None:
    rank = tensors["A"].shape[0] if "A" in tensors else 0
    wanted: dict[str, tuple[int, ...]] = {}
    wanted |= {"A": (rank, module.inputs), "B": (module.outputs, rank)}
    if dora:
        wanted["vector"] = (module.outputs,)
    for part, shape in wanted.items():
        got = tensors[part].shape if part in tensors else None
        # Older versions of PEFT store the magnitudes as a row.
        if got is None or (got != shape and not (part == "vector" and got == (1, *shape))):
            what = "DoRA's lengths" if part == "vector" else part
            raise ValueError(
                f"{folder}: the adapter does not fit the base: {what} of {module.name} "
                f"{'is missing' if got is None else f'has the shape {got}'}, wanted {shape}; give "
                "the base that the adapter was made for"
            )


def _split(module: Module, whole: Factors) -> dict[Slot, Factors]:
    """Splits a module's adapter into adapters of its matrices.

    They all use the same A; each matrix has its own columns of B. If the matrices use different
    rows of B, as in the stacks of `peft_write`, each keeps only the rank that it uses.
    """
    if len(module.slots) == 1:
        return {module.slots[0]: whole}
    parts = {slot: slice(slot.start, slot.start + slot.size) for slot in module.slots}
    used = {slot: np.flatnonzero(np.any(whole.b[:, part], axis=1)) for slot, part in parts.items()}
    together = [row for rows in used.values() for row in rows]
    apart = len(together) == len(set(together)) and sum(map(bool, map(len, used.values()))) > 1
    result = {}
    for slot, part in parts.items():
        a, b = whole.a, whole.b[:, part]
        if whole.m is None and apart:
            a, b = a[:, used[slot]], b[used[slot]]
        result[slot] = Factors(a, b, None if whole.m is None else whole.m[part], whole.scale)
    return result


def _without_unused(
    modules: Mapping[str, Module], found: Mapping[Slot, Factors]
) -> dict[Slot, Factors]:
    """Drops matrices of fused modules whose B is 0 in all layers, if another matrix's B is not."""
    trained = {slot.name for slot, factors in found.items() if np.any(factors.b)}
    fused: dict[str, set[str]] = {}
    for module in modules.values():
        names = {slot.name for slot in module.slots}
        for slot in module.slots:
            fused[slot.name] = names
    kept = {}
    for slot, factors in found.items():
        idle = slot.name not in trained and bool(fused[slot.name] & trained)
        if not (idle and factors.m is None) and factors.b.shape[0]:
            kept[slot] = factors
    return kept


def _check_unfused(modules: Mapping[str, Module], found: Mapping[Slot, Factors]) -> None:
    for module in modules.values():
        if len(module.slots) > 1 and any(slot in found for slot in module.slots):
            raise ValueError(
                f"init_lora_weights=pissa of the fused module {module.name}: its singular vectors "
                "are those of several matrices here; let PEFT convert the adapter (save_pretrained "
                "with path_initial_model_for_weight_conversion) or merge it"
            )


def _stack(found: Mapping[Slot, Factors], shapes: Params) -> Params:
    """The tree of adapters, zero-padded for layers with a lower rank than others or no adapter."""
    tree = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    for slot, factors in found.items():
        node, rank = leaf_at(tree, slot.path[:-1]), factors.b.shape[0]
        at = () if slot.layer is None else (slot.layer,)
        node["lora_a"][(*at, slice(None), slice(rank))] = factors.a
        node["lora_b"][(*at, slice(rank))] = factors.b
        if factors.m is not None:
            node["lora_m"][(*at, slice(None))] = factors.m
    return tree


# --- whole modules -------------------------------------------------------------------------------


def _with_whole(
    folder: pathlib.Path, model: Decoder | Scorer, params: Params, tensors: Mapping[str, np.ndarray]
) -> tuple[Decoder | Scorer, Params, set[str]]:
    """Replaces the base's modules that an adapter's file holds whole.

    Returns:
      (model, parameters, paths of the trained modules).
    """
    plain, copies = {}, {}
    for name, tensor in tensors.items():
        if ".base_layer." in name:  # PEFT copies an adapted embedding into the file
            copies[name.replace(".base_layer.", ".")] = tensor
        else:
            plain[re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.\w+$)", "", name)] = tensor
    if not plain and not copies:
        return model, params, set()
    decoder = model.base if isinstance(model, Scorer) else model
    score = plain.get("score.weight")
    leaves = {leaf.path: leaf for leaf in all_leaves(decoder, 1 if score is None else len(score))}
    read: dict[str, np.ndarray] = {}
    known = {name for leaf in leaves.values() for name in leaf.names}
    for name in [*plain, *copies]:
        if name not in known:
            raise ValueError(
                f"{folder}: the adapter does not fit the base: {name} is no tensor of it; give the "
                "base that the adapter was made for"
            )
    for path, leaf in leaves.items():
        for source in (copies, plain):
            here = [name for name in leaf.names if name in source]
            if not here:
                continue
            if len(here) < len(leaf.names):
                absent = next(name for name in leaf.names if name not in source)
                raise ValueError(
                    f"{folder}: {here[0]} is trained whole and {absent} is not; layers are stacked "
                    "here, so a module is trained in all of them or in none"
                )
            read[path] = _leaf(folder, leaf, source)
    saved = {path for path, leaf in leaves.items() if leaf.names[0] in plain}
    model, params = _put_whole(folder, model, params, read, saved)
    return model, params, saved


def _leaf(folder: pathlib.Path, leaf: Leaf, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A leaf from its HF tensors; an embedding or head may have a different number of rows."""
    items = []
    resizes = leaf.path in ("embed/embedding", "head/kernel")
    for name, _ in zip(leaf.names, tensor_positions(leaf), strict=True):
        tensor = tensors[name]
        wrong = tensor.shape[1:] if resizes else tensor.shape
        if wrong != (leaf.tensor_shape[1:] if resizes else leaf.tensor_shape):
            raise ValueError(
                f"{folder}: the adapter does not fit the base: {name} has the shape "
                f"{tensor.shape}, wanted {leaf.tensor_shape}; give the base that the adapter was "
                "made for"
            )
        if leaf.window is not None:
            axis, start, _ = leaf.window
            size = leaf.item_shape[1 - axis if leaf.transpose else axis]
            tensor = tensor.take(range(start, start + size), axis=axis)
        items.append(np.swapaxes(tensor, -1, -2) if leaf.transpose else tensor)
    if not leaf.stacked:
        return items[0]
    return np.stack(items).reshape(leaf.shape)


def _put_whole(
    folder: pathlib.Path,
    model: Decoder | Scorer,
    params: Params,
    read: dict[str, np.ndarray],
    saved: set[str],
) -> tuple[Decoder | Scorer, Params]:
    decoder = model.base if isinstance(model, Scorer) else model
    scorer = "score/kernel" in read or isinstance(model, Scorer)
    if scorer:
        read.pop("head/kernel", None)
        saved.discard("head/kernel")
        outputs = read["score/kernel"].shape[1] if "score/kernel" in read else None
        same = isinstance(model, Scorer) and outputs in (None, max(1, len(model.attributes)))
        if not same:
            names = () if outputs == 1 else tuple(f"LABEL_{i}" for i in range(outputs or 1))
            model = Scorer(decoder, names)
        params = {name: value for name, value in params.items() if name != "head"}
    embedding, head = read.get("embed/embedding"), read.get("head/kernel")
    config = decoder.config
    if config.tie_embeddings and not scorer and saved & {"embed/embedding", "head/kernel"}:
        if embedding is not None and head is not None and np.array_equal(embedding, head.T):
            read.pop("head/kernel")  # still tied
            saved.discard("head/kernel")
        else:  # PEFT trains a copy of either the embedding or the head
            config = dataclasses.replace(config, tie_embeddings=False)
            params = params | {"head": {"kernel": jnp.transpose(params["embed"]["embedding"])}}
    rows = {x.shape[i] for x, i in ((embedding, 0), (read.get("head/kernel"), 1)) if x is not None}
    if rows - {config.vocab_size}:
        wanted = {"embed/embedding"} if config.tie_embeddings or scorer else {
            "embed/embedding", "head/kernel",
        }  # fmt: skip
        if len(rows) > 1 or not wanted <= read.keys():
            raise ValueError(
                f"{folder}: the adapter does not fit the base: its embedding or head has "
                f"{max(rows)} rows, the base has {config.vocab_size}, and only one of the two is "
                "in the adapter; give the base that the adapter was made for"
            )
        config = dataclasses.replace(config, vocab_size=rows.pop())
    decoder = dataclasses.replace(decoder, config=config)
    model = dataclasses.replace(model, base=decoder) if isinstance(model, Scorer) else decoder
    axes: Params = {}
    values: Params = {}
    for path, value in read.items():
        put(axes, path, get(model.axes, path))
        put(values, path, value.astype(params["embed"]["embedding"].dtype))
    return model, combine(_place(values, axes, params), _lacking(params, values))


def _lacking(params: Params, other: Params) -> Params:
    """The parameters that another tree does not have."""
    kept: Params = {}
    have = families.flatten(other)
    for path, leaf in families.flatten(params).items():
        if path not in have:
            put(kept, path, leaf)
    return kept


def _place(tree: Params, axes: Params, params: Params) -> Params:
    """Puts numpy arrays on the base's mesh, or on the default device."""
    mesh = mesh_of(params)
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    layouts = param_shardings(axes, mesh, tree)
    return jax.tree.map(
        lambda x, layout: jax.make_array_from_callback(x.shape, layout, lambda index: x[index]),
        tree,
        layouts,
    )
