"""Loads models from safetensors folders, GGUF files or Orbax folders as sharded parameters.

It reads leaf by leaf, each device's part directly from the file; see `jaxalign.hf.blocks`. Nothing
here runs code from a checkpoint; pickle files are never read.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.hf import checksums, families, orbax_folder, peft, safetensors_file
from jaxalign.hf.blocks import load_leaf, workers
from jaxalign.hf.families import Leaf
from jaxalign.hf.gguf_file import GGUFFile
from jaxalign.hf.gguf_lora import is_gguf_adapter
from jaxalign.hf.hints import prefix_hint, what_lies_there
from jaxalign.hf.quantized_base import QuantizedLeaves
from jaxalign.hf.save import abbreviate, to_dtype
from jaxalign.hf.source import SOURCE_DTYPES, base_of, is_adapter, locate, read_json
from jaxalign.hf.special_tokens import GENERATION_FILE
from jaxalign.models.backend import backend
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.quantized import check_kind, require_qwix
from jaxalign.models.scorer import Scorer, weigh_attributes
from jaxalign.parallel.sharding import param_shardings
from jaxalign.types import Params

_PATTERNS = (
    "config.json",
    GENERATION_FILE,
    safetensors_file.SINGLE,
    safetensors_file.INDEX,
    "model-*-of-*.safetensors",
    *peft.PATTERNS,
)

_HEAD = "lm_head.weight"
_COMPARED = 1 << 20  # number of elements compared at a time


def fetch_model(source: str | os.PathLike[str]) -> pathlib.Path:
    """Downloads the files that `load_pretrained` would read of a hub id, and returns their path.

    Raises:
      ValueError: as `jaxalign.hf.source.locate`.
    """
    return locate(source, _PATTERNS)


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: str | None = None,
    remat: str = "none",
    attention: str = "auto",
    base: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
) -> tuple[Any, Params]:
    """Loads a model and its parameters.

    Args:
      source: a folder with `config.json` and safetensors (single or sharded with an index), a
        folder that `jaxalign import` made, a `.gguf` file, or a hub id. An adapter's folder (PEFT)
        gives the base with the adapter merged; `load_adapter` keeps the two separate. An adapter's
        `.gguf` file also gives the merged model; its `base` must be given.
      mesh: the mesh for the parameters, which are sharded by their logical axes; None: the default
        device.
      dtype: dtype of the parameters (not of the computation): float32, bfloat16, float16, or
        "source" for each parameter's dtype in the file (float32 if quantised there).
      compute_dtype: dtype of activations and matmuls; by default bfloat16 on GPU and TPU, float32
        on CPU.
      remat: what the backward pass keeps, see `jaxalign.models.layer_loop.REMAT`.
      attention: "auto" (by backend), "xla", "splash", "cudnn" or "pallas", see
        `jaxalign.models.attention.dispatch`.
      base: the base of an adapter; None: the base that its configuration names.
      quantize: "nf4", "nf4-double" or "int8": keeps the projections of all blocks in 4 or 8 bits,
        to train adapters over them (`add_lora`), see `jaxalign.models.quantized`. They are
        quantised while they are read, one layer's matrix at a time. None: floats.

    Returns:
      `(Decoder, params)`; `(Scorer, params)` for a sequence-classification model. Its labels become
      the scorer's attributes, unless there is a single unnamed one. `params` is a nested dict of
      arrays.

    Raises:
      ValueError: nothing to load there; a config the decoder does not cover; weights that are
        missing, unexpected, duplicate or of the wrong shape (all are listed); a file that its
        checksums, if any, show to be damaged; `quantize` with an adapter's folder or an Orbax
        folder, or without the package qwix.
    """
    check_kind(quantize)
    if quantize is not None:
        require_qwix()
    kind = None if isinstance(dtype, str) and dtype == "source" else to_dtype(dtype)
    path = locate(source, _PATTERNS)
    if is_adapter(path) or (base is not None and is_gguf_adapter(path)):
        if quantize is not None:
            raise ValueError(
                f"{path} is an adapter, which is merged into its base's floats, and quantize="
                f"{quantize!r} reads none; write the merged model first (jaxalign export {path} "
                "--to hf --out …) and quantise that, or load its base with quantize and put the "
                "adapter on it (load_adapter)"
            )
        options = {"compute_dtype": compute_dtype, "remat": remat, "attention": attention}
        return _load_adapted(path, base, mesh=mesh, dtype=dtype, **options)
    if base is not None:
        raise ValueError(
            f"base={os.fspath(base)!r}: wanted none, since {os.fspath(source)!r} is a whole model "
            "and no adapter"
        )
    with contextlib.closing(_open(path)) as file:
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        if compute_dtype is None:
            compute_dtype = backend(device).default_dtype
        options = {"compute_dtype": compute_dtype, "remat": remat, "attention": attention}
        model = _model(path, file, **options)
        config, scorer = model.config, isinstance(model, Scorer)
        shardings = {}
        if mesh is not None:
            shardings = families.flatten(param_shardings(model.axes, mesh, model.shapes))
        if isinstance(file, orbax_folder.OrbaxFolder):
            if quantize is not None:
                raise ValueError(
                    f"{path} is an Orbax folder, whose layers are read together; quantize="
                    f"{quantize!r} reads safetensors and GGUF, matrix by matrix. Take what it was "
                    "imported from, or write it as a folder (jaxalign export … --to hf)"
                )
            _check_folder_sums(path)
            return model, file.load(model.shapes, shardings, kind)
        leaves = families.leaves(config, model.shapes, file.shapes)
        spare_head = config.tie_embeddings or scorer
        _check_tensors(path, file, leaves, config, spare_head=spare_head)
        if isinstance(file, safetensors_file.SafetensorsFolder):
            with workers() as pool:  # read an extra time; the processes divide the files among them
                file.check_sums(pool, (jax.process_index(), jax.process_count()))
        flat = {}
        try:
            quantized = None if quantize is None else QuantizedLeaves(model, quantize, mesh)
            with workers() as pool:
                for leaf in leaves:
                    widest, layout = _widest(file, leaf), shardings.get(leaf.path)
                    if quantized is not None and leaf.path in quantized.paths:
                        flat[leaf.path] = quantized.load(file, leaf, layout, widest, pool)
                        continue
                    made = widest if kind is None else kind
                    flat[leaf.path] = load_leaf(file, leaf, made, layout, pool)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return model if quantized is None else quantized.model, families.unflatten(flat)


def _load_adapted(
    path: pathlib.Path, base: str | os.PathLike[str] | None, **options: Any
) -> tuple[Any, Params]:
    """Loads a base and merges a folder's adapter into it."""
    try:
        start = base_of(path) if base is None else base
        if is_adapter(locate(start, _PATTERNS)):
            raise ValueError(f"{os.fspath(start)!r} is an adapter itself; merge that first")
        model, params = load_pretrained(start, **options)
    except ValueError as error:
        there = what_lies_there(path) or "it holds an adapter, no whole model"
        raise ValueError(
            f"{path}: {there}, or name its base (base=…). The base could not be loaded: {error}"
        ) from error
    return peft.merge_adapter(model, params, path)


def load_language_model(
    source: str | os.PathLike[str], *, option: str = "source", **options: Any
) -> tuple[Decoder, Params]:
    """Loads a language model; a reward model is an error.

    Args:
      source: as for `load_pretrained`.
      option: the user's name for `source`, for the message.
      **options: options of `load_pretrained`.

    Raises:
      ValueError: a reward model; or as `load_pretrained`.
    """
    model, params = load_pretrained(source, **options)
    return expect_language_model(model, source, option), params


def load_reward_model(
    source: str | os.PathLike[str],
    weights: Mapping[str, float] | None = None,
    *,
    option: str = "source",
    **options: Any,
) -> tuple[Scorer, Params]:
    """Loads a reward model; a language model is an error.

    Args:
      source: as for `load_pretrained`.
      weights: attribute → weight, for one score out of several; see
        `jaxalign.models.scorer.weigh_attributes`. None: all scores.
      option: the user's name for `source`, for the message.
      **options: options of `load_pretrained`.

    Raises:
      ValueError: a language model; weights that do not fit its attributes; or as `load_pretrained`.
    """
    model, params = load_pretrained(source, **options)
    scorer = expect_reward_model(model, source, option)
    return (scorer, params) if weights is None else weigh_attributes(scorer, params, weights)


def expect_language_model(
    model: Decoder | Scorer, source: str | os.PathLike[str], option: str = "source"
) -> Decoder:
    """Returns the model; raises ValueError if it is a reward model."""
    if not isinstance(model, Decoder):
        raise ValueError(
            f"{option}={os.fspath(source)!r} is a reward model; wanted a language model"
        )
    return model


def expect_reward_model(
    model: Decoder | Scorer, source: str | os.PathLike[str], option: str = "source"
) -> Scorer:
    """Returns the model; raises ValueError if it is a language model."""
    if not isinstance(model, Scorer):
        raise ValueError(
            f"{option}={os.fspath(source)!r} is a language model without a score; wanted a reward "
            "model, as `jaxalign reward` makes"
        )
    return model


def load_model(source: str | os.PathLike[str]) -> Decoder | Scorer:
    """A model without its parameters, which are read only for an adapter's base.

    Args:
      source: as for `load_pretrained`.

    Raises:
      ValueError: nothing there, a config the decoder does not cover, or a damaged file.
    """
    path = locate(source, _PATTERNS)
    if is_adapter(path):  # modules that it holds whole may change the base's shape
        return load_pretrained(source, compute_dtype="float32")[0]
    with contextlib.closing(_open(path)) as file:
        return _model(path, file, compute_dtype="float32", remat="none")


def _model(path: pathlib.Path, file: Any, **options: Any) -> Decoder | Scorer:
    hf = dict(file.config)
    if path.is_dir() and (path / GENERATION_FILE).is_file():
        hf[families.GENERATION] = read_json(path / GENERATION_FILE)
    hf[SOURCE_DTYPES] = file.source_dtypes
    try:
        if _has_own_head(file, hf):
            hf["tie_word_embeddings"] = False
        base = Decoder(families.config_from_hf(hf), **options)
        return Scorer(base, families.attributes_of(hf)) if families.is_scorer(hf) else base
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_folder_sums(path: pathlib.Path) -> None:
    share = (jax.process_index(), jax.process_count())
    damages = checksums.check(path, share) or []
    params = [str(d) for d in damages if d.file.startswith(f"{orbax_folder.PARAMS}/")]
    if params:
        raise ValueError(f"{path} is damaged: {abbreviate(params)}; import the model again")
    for damage in damages:
        print(f"{path / damage.file} is not as it was written: {damage.what}; edited, or damaged")


def _open(path: pathlib.Path) -> Any:
    if path.is_file():
        return GGUFFile(path)
    if orbax_folder.is_orbax_folder(path):
        return orbax_folder.OrbaxFolder(path)
    return safetensors_file.SafetensorsFolder(path)


def _has_own_head(file: Any, hf: Mapping[str, Any]) -> bool:
    """Whether a file has a different head although its config ties the head to the embedding.

    transformers compares the two as well, and keeps both where they differ.
    """
    shapes = getattr(file, "shapes", {})  # an Orbax folder holds our parameters, not HF tensors
    if _HEAD not in shapes or _HEAD in file.problems or families.is_scorer(hf):
        return False
    if not families.config_from_hf(hf).tie_embeddings:
        return False
    entries = families.find_family(hf.get("model_type")).table
    names = [entry.name for entry in entries if entry.path == "embed/embedding"]
    embedding = next((name for name in names if name in shapes and name not in file.problems), None)
    if embedding is None or shapes[embedding] != shapes[_HEAD]:
        return False
    rows, width = shapes[_HEAD]
    step = max(1, _COMPARED // max(1, width))
    for first in range(0, rows, step):
        part = (slice(first, min(first + step, rows)), slice(0, width))
        head = np.array(file.read(_HEAD, part))  # the next read uses the same memory
        if not np.array_equal(head, file.read(embedding, part)):
            return True
    return False


def _widest(file: Any, leaf: Leaf) -> np.dtype:
    """The widest dtype of a leaf's tensors in the file, limited to dtypes that arrays can have."""
    widest = max((file.dtypes[name] for name in leaf.names), key=lambda dtype: dtype.itemsize)
    return np.dtype(np.float32) if widest.itemsize > 4 else widest


def _check_tensors(
    path: pathlib.Path, file: Any, leaves: list[Leaf], config: DecoderConfig, *, spare_head: bool
) -> None:
    """Compares a source's tensors with those that the model needs."""
    wanted = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    ignored = families.find_family(config.family).ignored
    # Redundant tensors: buffers of the family, the second name of a tied matrix, and the head of
    # the language model from which a reward model was made.
    extra = {name for name in file.shapes if any(fnmatch.fnmatchcase(name, p) for p in ignored)}
    extra |= {_HEAD} if spare_head else set()
    unexpected = [name for name in file.shapes if name not in wanted and name not in extra]
    wrong = [
        f"{name} {file.shapes[name]}, wanted {shape}"
        for name, shape in wanted.items()
        if name in file.shapes and file.shapes[name] != shape
    ]
    lists = {
        "unusable": [
            f"{name}: {why}"
            for name, why in file.problems.items()
            if name in wanted or name not in extra
        ],
        "missing": [name for name in wanted if name not in file.shapes],
        "unexpected": sorted(unexpected),
        "wrong shape": wrong,
    }
    problems = [f"{title}: {abbreviate(names)}" for title, names in lists.items() if names]
    if problems:
        raise ValueError(
            f"{path}: the weights do not fit config.json. {'. '.join(problems)}. "
            f"{prefix_hint(wanted, file.shapes)}"
        )
