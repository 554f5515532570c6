"""Models in Hugging Face form: safetensors or GGUF to sharded parameters, and back.

Reading goes leaf by leaf and, on a mesh, shard by shard: the host holds about one leaf at a time.
Nothing here runs code from a checkpoint; pickle files are refused.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign import safetensors_file
from jaxalign.gguf_file import GGUFFile
from jaxalign.models import families
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.families import Leaf
from jaxalign.models.families.table import Tensor
from jaxalign.models.heads import Scorer
from jaxalign.sharding import param_shardings
from jaxalign.source import locate, read_json
from jaxalign.tokenizer import load_tokenizer
from jaxalign.types import Params

__all__ = ["load_pretrained", "load_tokenizer", "save_pretrained"]

_GENERATION = "generation_config.json"
_PATTERNS = (
    "config.json",
    _GENERATION,
    safetensors_file.SINGLE,
    safetensors_file.INDEX,
    "model-*-of-*.safetensors",
)
_DTYPES = ("float32", "bfloat16", "float16")

# What a model folder may hold: only a folder with nothing else is ever replaced.
_OURS = (
    "config.json",
    _GENERATION,
    "model*.safetensors",
    safetensors_file.INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab.json",
    "merges.txt",
)


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: str | None = None,
    remat: str = "none",
) -> tuple[Any, Params]:
    """Loads a model and its parameters.

    Args:
      source: a folder with `config.json` and safetensors (single or sharded with an index), a
        `.gguf` file, or a hub id.
      mesh: where the parameters go, laid out by their logical axes; by default the default device.
      dtype: of the parameters: float32, bfloat16 or float16. Not of the computation.
      compute_dtype: of activations and matmuls; by default bfloat16 on GPU and TPU, float32 on CPU.
      remat: what the backward pass keeps, see `jaxalign.models.decoder.REMAT`.

    Returns:
      `(Decoder, params)`; `(Scorer, params)` for a sequence-classification model, whose labels, if
      there are several or the one has a name, are the scorer's attributes.
      `params` is a nested dict of arrays.

    Raises:
      ValueError: nothing to load there; a config the decoder does not cover; weights that are
        missing, unexpected, duplicate or of the wrong shape (all of them listed); a damaged file.
    """
    kind = _dtype(dtype)
    path = locate(source, _PATTERNS)
    file = GGUFFile(path) if path.is_file() else safetensors_file.SafetensorsFolder(path)
    with contextlib.closing(file):
        hf = dict(file.config)
        if path.is_dir() and (path / _GENERATION).is_file():
            hf[families.GENERATION] = read_json(path / _GENERATION)
        try:
            config = families.config_from_hf(hf)
            scorer = families.is_scorer(hf)
            attributes = families.attributes_of(hf) if scorer else ()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        if compute_dtype is None:
            compute_dtype = "float32" if device.platform == "cpu" else "bfloat16"
        base = Decoder(config, compute_dtype=compute_dtype, remat=remat)
        model = Scorer(base, attributes) if scorer else base
        leaves = families.leaves(config, model.shapes, file.shapes)
        _check_tensors(path, file, leaves, config, tied=config.tie_embeddings and not scorer)
        if mesh is None:
            flat = {leaf.path: jnp.asarray(_read(file, leaf, kind)) for leaf in leaves}
        else:
            shardings = families.flatten(param_shardings(model.axes, mesh, model.shapes))
            flat = {leaf.path: _place(file, leaf, kind, shardings[leaf.path]) for leaf in leaves}
    return model, families.unflatten(flat)


def _dtype(dtype: Any) -> np.dtype:
    kind = jnp.dtype(dtype)
    if kind.name not in _DTYPES:
        raise ValueError(f"dtype={kind.name}: wanted one of {', '.join(_DTYPES)}")
    return kind


def _check_tensors(
    path: pathlib.Path, file: Any, leaves: list[Leaf], config: DecoderConfig, *, tied: bool
) -> None:
    """Compares what a source holds with what the model needs."""
    wanted = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    ignored = families.find_family(config.family).ignored
    unexpected = [
        name
        for name in file.shapes
        if name not in wanted
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
        # The second name of a tied matrix says nothing new either.
        and not (tied and name == "lm_head.weight")
    ]
    wrong = [
        f"{name} {file.shapes[name]}, wanted {shape}"
        for name, shape in wanted.items()
        if name in file.shapes and file.shapes[name] != shape
    ]
    lists = {
        "unusable": file.problems,
        "missing": [name for name in wanted if name not in file.shapes],
        "unexpected": sorted(unexpected),
        "wrong shape": wrong,
    }
    told = [f"{title}: {_some(names)}" for title, names in lists.items() if names]
    if told:
        raise ValueError(
            f"{path}: the weights do not fit config.json. {'. '.join(told)}. Check that config and "
            f"weights belong together"
        )


def _some(names: list[str], most: int = 12) -> str:
    rest = f" … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _read(
    file: Any, leaf: Leaf, dtype: np.dtype, index: tuple[slice, ...] | None = None
) -> np.ndarray:
    """Reads the part of a leaf that `index` selects (all of it by default) into host memory."""
    if index is None:
        index = (slice(None),) * len(leaf.shape)
    bounds = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
    out = np.empty([len(bound) for bound in bounds], dtype)
    names = np.array(leaf.names).reshape(leaf.shape[: leaf.stacked])
    inside = leaf.index([slice(b.start, b.stop) for b in bounds[leaf.stacked :]])
    for row, place in enumerate(itertools.product(*bounds[: leaf.stacked])):
        item = file.read(str(names[place]), inside)
        target = out.reshape(-1, *out.shape[leaf.stacked :])[row]
        target[...] = item.swapaxes(-1, -2) if leaf.transpose else item
    return out


def _place(file: Any, leaf: Leaf, dtype: np.dtype, sharding: Any) -> jax.Array:
    """Reads each distinct shard of a leaf once and puts it on its devices."""
    seen: dict[Any, np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        key = None if index is None else tuple((part.start, part.stop) for part in index)
        if key not in seen:
            seen[key] = _read(file, leaf, dtype, index)
        return seen[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


# --- saving --------------------------------------------------------------------------------------


def save_pretrained(
    model: Any,
    params: Params,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers loads: `AutoModelForCausalLM`, or for a `Scorer`
    `AutoModelForSequenceClassification`.

    The folder appears whole or not at all: everything is written beside it and then renamed.

    Args:
      model: a `Decoder` without adapters (`merge_lora` first) or a `Scorer`.
      params: its parameters, on one device or sharded.
      folder: to be made. An existing model folder is replaced; a folder that holds anything else
        is refused.
      tokenizer: saved along, with its chat template; also sets the token ids of the configs.
      dtype: of the saved weights; by default as the parameters are.
      max_shard_bytes: weights beyond this are split over files with an index.

    Raises:
      ValueError: parameters that do not fit the model, a tokenizer larger than the vocabulary, or
        a folder that must not be replaced.
    """  # fmt: skip
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: wanted a positive number of bytes")
    target = pathlib.Path(folder).expanduser().resolve()
    _check_replaceable(target)
    config = model.config
    scorer = isinstance(model, Scorer)
    leaves = families.leaves(config, model.shapes)
    flat = families.flatten(params)
    _check_params(leaves, flat)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{config.vocab_size}; they do not belong together"
        )
    kinds = {
        leaf.path: _dtype(flat[leaf.path].dtype if dtype is None else dtype) for leaf in leaves
    }
    # Wider dtypes first, so that every tensor of a mixed file is aligned.
    leaves.sort(key=lambda leaf: -kinds[leaf.path].itemsize)
    whole = families.tensors(leaves)
    tensors = [
        safetensors_file.Tensor(tensor.name, _kind(tensor, kinds), tensor.shape) for tensor in whole
    ]
    hf = families.config_to_hf(
        config,
        scorer=scorer,
        dtype=kinds["embed/embedding"].name,
        attributes=model.attributes if isinstance(model, Scorer) else (),
    )
    kept = json.loads(config.source_config or "{}").get(families.GENERATION, {})
    generation = kept | _token_ids(hf | kept, tokenizer)
    hf |= _token_ids(hf, tokenizer)

    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    fresh.mkdir()
    try:
        safetensors_file.write_sharded(fresh, tensors, _arrays(whole, flat, kinds), max_shard_bytes)
        _write_json(fresh / "config.json", hf)
        if not scorer:
            _write_json(fresh / _GENERATION, generation)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, fresh)
        _swap(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _check_params(leaves: list[Leaf], flat: dict[str, Any]) -> None:
    wanted = {leaf.path: leaf.shape for leaf in leaves}
    lists = {
        "missing": [path for path in wanted if path not in flat],
        "unexpected": [path for path in flat if path not in wanted],
        "wrong shape": [
            f"{path} {tuple(flat[path].shape)}, wanted {shape}"
            for path, shape in wanted.items()
            if path in flat and tuple(flat[path].shape) != shape
        ],
    }
    told = [f"{title}: {_some(names)}" for title, names in lists.items() if names]
    if told:
        hint = (
            "; merge adapters first (merge_lora)" if any("lora_" in path for path in flat) else ""
        )
        raise ValueError(f"the parameters do not fit the model. {'. '.join(told)}{hint}")


def _check_replaceable(target: pathlib.Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    strange = [p.name for p in sorted(target.iterdir()) if not any(p.match(name) for name in _OURS)]
    if strange:
        raise ValueError(
            f"{target} holds {_some(strange, 5)}, which a saved model does not; saving replaces "
            f"the whole folder, so give a new one"
        )


def _kind(tensor: Tensor, kinds: dict[str, np.dtype]) -> np.dtype:
    """The dtype of a tensor; a fused one takes the widest of its parts."""
    return max((kinds[piece.leaf.path] for piece in tensor.pieces), key=lambda kind: kind.itemsize)


def _arrays(
    tensors: list[Tensor], flat: dict[str, Any], kinds: dict[str, np.dtype]
) -> Iterator[np.ndarray]:
    """The HF tensors in order."""
    for tensor in tensors:
        out = np.empty(tensor.shape, _kind(tensor, kinds))
        for piece in tensor.pieces:
            item = np.asarray(flat[piece.leaf.path][piece.position])
            out[piece.leaf.index()] = item.swapaxes(-1, -2) if piece.leaf.transpose else item
        yield out


def _token_ids(hf: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Token ids for a config: the tokenizer's, else those it has.

    A source that lists several stop tokens keeps its list as long as the tokenizer's EOS is in it.
    """
    ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in hf}
    if tokenizer is None:
        return ids
    for key in ("bos_token_id", "pad_token_id"):
        value = getattr(tokenizer, key)
        if value is not None:
            ids[key] = value
    stops = ids.get("eos_token_id")
    stop = tokenizer.eos_token_id
    if stop is not None and not (isinstance(stops, list) and stop in stops):
        ids["eos_token_id"] = stop
    return ids


def _save_tokenizer(tokenizer: Any, folder: pathlib.Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        # The name that transformers 4 knows as well; 5 takes it as an alias.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_json(path, config)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _swap(fresh: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a finished folder into place; what was there goes only once the new one stands."""
    old = target.parent / f".{target.name}.{secrets.token_hex(4)}.old"
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(fresh, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise
    if replaced:
        shutil.rmtree(old)
