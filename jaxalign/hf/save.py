"""Saving a model as a Hugging Face folder: whole or not at all, by one process or several."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.hf import families, safetensors_file
from jaxalign.hf.blocks import item_blocks, workers
from jaxalign.hf.families import Leaf
from jaxalign.hf.families.table import Tensor
from jaxalign.hf.orbax_folder import PARAMS
from jaxalign.hf.safetensors_write import File, Planned, Writer, plan_files, write_index
from jaxalign.hf.source import SOURCE_DTYPES, read_json
from jaxalign.models.lm_head import Scorer
from jaxalign.parallel import distributed
from jaxalign.types import Params

GENERATION_FILE = "generation_config.json"
_DTYPES = ("float32", "bfloat16", "float16")

# What a model folder may hold: only a folder with nothing else is ever replaced.
_OURS = (
    "config.json",
    GENERATION_FILE,
    "model*.safetensors",
    safetensors_file.INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab.json",
    "merges.txt",
    PARAMS,
)


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

    The folder appears whole or not at all: everything is written beside it, into a folder whose
    name starts with a dot, and then renamed. Killed in between, a process leaves only that one.

    With several processes, all of them call this with the same arguments, and the folder is on a
    file system that they share. Each writes some of the weight files, in turn (so a model in one
    file is written by one); process 0 writes the rest.

    Args:
      model: a `Decoder` without adapters (`merge_lora` first) or a `Scorer`.
      params: its parameters, on one device or sharded.
      folder: to be made. An existing model folder is replaced; a folder that holds anything else
        is refused.
      tokenizer: saved along, with its chat template; also sets the token ids of the configs.
      dtype: of the saved weights: float32, bfloat16, float16; "source" for what each tensor was in
        the checkpoint that the model was loaded from (float32 where that was quantised); by
        default as the parameters are.
      max_shard_bytes: weights beyond this are split over files with an index.

    Raises:
      ValueError: parameters that do not fit the model, a tokenizer larger than the vocabulary,
        a folder that must not be replaced, values that the dtype cannot hold, or dtype "source" for
        a model that was not loaded.
      RuntimeError: another process failed.
    """  # fmt: skip
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: wanted a positive number of bytes")
    flat = families.flatten(params)
    planned = plan_tensors(model, params, dtype)
    files = plan_files(planned, max_shard_bytes, jax.process_count())
    jsons = configs(model, planned, tokenizer)
    target = pathlib.Path(folder).expanduser().resolve()
    main = distributed.is_main()
    fresh = target.parent / f".{target.name}.{distributed.broadcast_random():08x}.tmp"
    try:
        with distributed.fail_together("saving a model"):
            if main:
                check_replaceable(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh.mkdir()
        with distributed.fail_together("saving a model"):
            _write_weights(fresh, files, flat)
        with distributed.fail_together("saving a model"):
            if main:
                write_index(fresh, files)
                write_configs(fresh, jsons, tokenizer)
                swap(fresh, target)
    except BaseException:
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
        raise


def plan_tensors(model: Any, params: Params, dtype: Any = None) -> list[Planned]:
    """The tensors that `save_pretrained` would write, in order.

    Args:
      model: see there.
      params: see there.
      dtype: see there.
    """
    leaves = families.leaves(model.config, model.shapes)
    flat = families.flatten(params)
    _check_params(leaves, flat)
    planned = []
    for tensor in families.tensors(leaves):
        kinds = {to_dtype(flat[piece.leaf.path].dtype) for piece in tensor.pieces}
        if isinstance(dtype, str) and dtype == "source":
            kind = _source_dtype(model, tensor)
        elif dtype is not None:
            kind = to_dtype(dtype)
        elif len(kinds) == 1:
            kind = kinds.pop()
        else:
            kind = np.dtype(np.float32)  # holds whatever the parts of a fused tensor are
        planned.append(Planned(tensor, kind))
    # Wider dtypes first, so that every tensor of a mixed file is aligned.
    return sorted(planned, key=lambda p: -p.dtype.itemsize)


def _source_dtype(model: Any, tensor: Tensor) -> np.dtype:
    known = json.loads(model.config.source_config or "{}").get(SOURCE_DTYPES)
    if not known:
        raise ValueError(
            f"dtype='source': the model was not loaded from a checkpoint; name one of "
            f"{', '.join(_DTYPES)}"
        )
    kind = known.get(tensor.name, known["*"])
    return to_dtype("float32" if kind == "float64" else kind)


def configs(model: Any, planned: list[Planned], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """File name → contents of the JSON files that belong to a model.

    Args:
      model: a `Decoder` or `Scorer`.
      planned: its tensors.
      tokenizer: whose token ids go into them, or None.

    Raises:
      ValueError: the tokenizer is larger than the vocabulary.
    """
    config, scorer = model.config, isinstance(model, Scorer)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{config.vocab_size}; they do not belong together"
        )
    embedding = next(p for p in planned if p.tensor.pieces[0].leaf.path == "embed/embedding")
    hf = families.config_to_hf(
        config,
        scorer=scorer,
        dtype=embedding.dtype.name,
        attributes=model.attributes if isinstance(model, Scorer) else (),
    )
    hf.pop(SOURCE_DTYPES, None)
    kept = json.loads(config.source_config or "{}").get(families.GENERATION, {})
    generation = kept | _token_ids(hf | kept, tokenizer)
    files = {"config.json": hf | _token_ids(hf, tokenizer)}
    return files if scorer else files | {GENERATION_FILE: generation}


def write_configs(folder: pathlib.Path, jsons: dict[str, dict[str, Any]], tokenizer: Any) -> None:
    """Writes what `configs` gave, and the tokenizer if there is one."""
    for name, value in jsons.items():
        _write_json(folder / name, value)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)


def _write_weights(folder: pathlib.Path, files: list[File], flat: dict[str, Any]) -> None:
    """Writes this process's files; takes part in gathering what is in the others'."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder.parent} is not shared between the processes; save to a file system that all "
            f"hosts have"
        )
    failed: Exception | None = None
    with workers() as pool:
        for file in files:
            mine = file.owner == jax.process_index()
            writer = None
            for planned in file.tensors:
                # All of them, also after an error: the other processes wait for these parts.
                blocks = [
                    item_blocks(flat[piece.leaf.path], piece.leaf, piece.position, needed=mine)
                    for piece in planned.tensor.pieces
                ]
                if not mine or failed is not None:
                    continue
                try:
                    writer = Writer(folder, file, pool) if writer is None else writer
                    writer.write(planned, blocks)
                except (OSError, ValueError) as error:
                    failed = error
            if writer is not None:
                writer.close()
    if failed is not None:
        raise failed


def to_dtype(dtype: Any) -> np.dtype:
    """A dtype that parameters may have.

    Raises:
      ValueError: any other.
    """
    kind = jnp.dtype(dtype)
    if kind.name not in _DTYPES:
        raise ValueError(f"dtype={kind.name}: wanted one of {', '.join(_DTYPES)}")
    return kind


def some(names: list[str], most: int = 12) -> str:
    """The first few of a list of names."""
    rest = f" … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


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
    told = [f"{title}: {some(names)}" for title, names in lists.items() if names]
    if told:
        hint = (
            "; merge adapters first (merge_lora)" if any("lora_" in path for path in flat) else ""
        )
        raise ValueError(f"the parameters do not fit the model. {'. '.join(told)}{hint}")


def check_replaceable(target: pathlib.Path) -> None:
    """Refuses a place that holds anything but a saved model.

    Raises:
      ValueError: what it holds.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    strange = [p.name for p in sorted(target.iterdir()) if not any(p.match(name) for name in _OURS)]
    if strange:
        raise ValueError(
            f"{target} holds {some(strange, 5)}, which a saved model does not; saving replaces "
            f"the whole folder, so give a new one"
        )


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


def swap(fresh: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a finished folder into place; what was there goes only once the new one stands."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
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
