"""Saves a model as a Hugging Face folder, atomically, from one process or several."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.chat import NONE as NO_TEMPLATE
from jaxalign.data.chat import stop_token_ids
from jaxalign.hf import checksums, families, safetensors_file
from jaxalign.hf.blocks import item_blocks, workers
from jaxalign.hf.families import Leaf
from jaxalign.hf.families.table import Tensor
from jaxalign.hf.orbax_folder import PARAMS
from jaxalign.hf.safetensors_write import File, Planned, Writer, plan_files, write_index
from jaxalign.hf.source import SOURCE_DTYPES, read_json
from jaxalign.hf.special_tokens import GENERATION_FILE, as_list, check_rows_for
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.parallel import distributed
from jaxalign.types import Params

_DTYPES = ("float32", "bfloat16", "float16")

# Contents of a model folder; a folder that holds anything else is never replaced.
_MODEL_FILES = (
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
    "vocab.txt",
    "*.model",
    PARAMS,
    checksums.NAME,  # beside PARAMS
    "export.json",  # a note by `jaxalign export --to`
    "model*.rejected",
    f"{PARAMS}.rejected",
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
    """Writes a folder that transformers loads.

    `AutoModelForCausalLM` loads a `Decoder`, `AutoModelForSequenceClassification` a `Scorer`.

    Saving is atomic: all files are written to a temporary folder beside the target, named with a
    leading dot, which is then renamed. A killed process leaves only the temporary folder.

    With several processes, all call this with the same arguments, and the folder is on a file
    system that they share. They write weight files round-robin, so a model of one file is written
    by a single process. Process 0 writes all other files.

    Args:
      model: a `Decoder` without adapters (`merge_lora` first) or a `Scorer`.
      params: its parameters, on one device or sharded.
      folder: the target. An existing model folder is replaced; a folder that holds anything else is
        an error.
      tokenizer: saved with its chat template; it also sets the token ids in the configs.
      dtype: dtype of the saved weights: float32, bfloat16 or float16; "source": each tensor's dtype
        in the checkpoint that the model was loaded from (float32 if it was quantised there); None:
        the parameters' dtype.
      max_shard_bytes: maximum size of a weight file; larger models get several and an index.

    Raises:
      ValueError: parameters that do not fit the model, a tokenizer larger than the vocabulary,
        a folder that must not be replaced, values that the dtype cannot hold, or dtype "source" for
        a model that was not loaded.
      RuntimeError: another process failed.
    """
    if not (isinstance(model, (Decoder, Scorer)) or hasattr(model, "config")):
        raise ValueError(
            f"save_pretrained: got a model of type {type(model).__name__}, wanted a Decoder or "
            "Scorer, whose configuration Hugging Face's folders can hold; save a model of your own "
            "with Orbax or numpy.savez"
        )
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: wanted a positive number of bytes")
    flat = families.flatten(params)
    planned = plan_tensors(model, params, dtype)
    files = plan_files(planned, max_shard_bytes, jax.process_count())
    config_files = configs(model, planned, tokenizer)
    target = pathlib.Path(folder).expanduser().resolve()
    main = distributed.is_main()
    temporary = target.parent / f".{target.name}.{distributed.broadcast_random():08x}.tmp"
    try:
        with distributed.fail_together("saving a model"):
            if main:
                check_replaceable(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
        with distributed.fail_together("saving a model"):
            _write_weights(temporary, files, flat)
        with distributed.fail_together("saving a model"):
            if main:
                write_index(temporary, files)
                write_configs(temporary, config_files, tokenizer)
                swap(temporary, target)
    except BaseException:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def plan_tensors(model: Any, params: Params, dtype: Any = None) -> list[Planned]:
    """The tensors that `save_pretrained` writes with these arguments, in order."""
    leaves = families.leaves(model.config, model.shapes)
    flat = families.flatten(params)
    _check_params(leaves, flat)
    planned = []
    for tensor in families.tensors(leaves):
        param_dtypes = {to_dtype(flat[piece.leaf.path].dtype) for piece in tensor.pieces}
        if isinstance(dtype, str) and dtype == "source":
            saved = _source_dtype(model, tensor)
        elif dtype is not None:
            saved = to_dtype(dtype)
        elif len(param_dtypes) == 1:
            saved = param_dtypes.pop()
        else:
            saved = np.dtype(np.float32)  # a fused tensor of leaves with different dtypes
        planned.append(Planned(tensor, saved))
    # Wider dtypes first, so that every tensor of a file with several dtypes is aligned.
    return sorted(planned, key=lambda p: -p.dtype.itemsize)


def _source_dtype(model: Any, tensor: Tensor) -> np.dtype:
    known = json.loads(model.config.source_config or "{}").get(SOURCE_DTYPES)
    if not known:
        raise ValueError(
            f"dtype='source': the model was not loaded from a checkpoint; name one of "
            f"{', '.join(_DTYPES)}"
        )
    name = known.get(tensor.name, known["*"])
    return to_dtype("float32" if name == "float64" else name)


def configs(model: Any, planned: list[Planned], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """A model's JSON files: file name → contents.

    Args:
      model: a `Decoder` or `Scorer`.
      planned: its tensors.
      tokenizer: source of the token ids, or None.

    Raises:
      ValueError: the tokenizer is larger than the vocabulary.
    """
    config, scorer = model.config, isinstance(model, Scorer)
    if tokenizer is not None:
        check_rows_for(tokenizer, config.vocab_size, "the model's vocabulary has")
    embedding = next(p for p in planned if p.tensor.pieces[0].leaf.path == "embed/embedding")
    hf = families.config_to_hf(
        config,
        scorer=scorer,
        dtype=embedding.dtype.name,
        attributes=model.attributes if isinstance(model, Scorer) else (),
    )
    hf.pop(SOURCE_DTYPES, None)
    loaded = json.loads(config.source_config or "{}").get(families.GENERATION, {})
    generation = loaded | _token_ids(hf | loaded, tokenizer, config)
    files = {"config.json": hf | _token_ids(hf, tokenizer, config)}
    return files if scorer else files | {GENERATION_FILE: generation}


def write_configs(folder: pathlib.Path, files: dict[str, dict[str, Any]], tokenizer: Any) -> None:
    """Writes the result of `configs`, and the tokenizer unless it is None."""
    for name, value in files.items():
        _write_json(folder / name, value)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _write_weights(folder: pathlib.Path, files: list[File], flat: dict[str, Any]) -> None:
    """Writes this process's files, and takes part in all-gathers for other processes' files."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder.parent} is not shared between the processes; save to a file system that all "
            f"hosts have"
        )
    failure: Exception | None = None
    with workers() as pool:
        for file in files:
            owned = file.owner == jax.process_index()
            writer = None
            for planned in file.tensors:
                # Also after an error: the other processes block in these all-gathers.
                blocks = [
                    item_blocks(flat[piece.leaf.path], piece.leaf, piece.position, needed=owned)
                    for piece in planned.tensor.pieces
                ]
                if not owned or failure is not None:
                    continue
                try:
                    writer = Writer(folder, file, pool) if writer is None else writer
                    writer.write(planned, blocks)
                except (OSError, ValueError) as error:
                    failure = error
            if writer is not None:
                writer.close()
    if failure is not None:
        raise failure


def to_dtype(dtype: Any) -> np.dtype:
    """Checks that weights can be saved in a dtype.

    Raises:
      ValueError: a dtype other than float32, bfloat16, float16.
    """
    result = jnp.dtype(dtype)
    if result.name not in _DTYPES:
        raise ValueError(f"dtype={result.name}: wanted one of {', '.join(_DTYPES)}")
    return result


def abbreviate(names: list[str], limit: int = 12) -> str:
    """The first few of a list of names, and the number of the others."""
    rest = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _check_params(leaves: list[Leaf], flat: dict[str, Any]) -> None:
    expected = {leaf.path: leaf.shape for leaf in leaves}
    lists = {
        "missing": [path for path in expected if path not in flat],
        "unexpected": [path for path in flat if path not in expected],
        "wrong shape": [
            f"{path} {tuple(flat[path].shape)}, wanted {shape}"
            for path, shape in expected.items()
            if path in flat and tuple(flat[path].shape) != shape
        ],
    }
    problems = [f"{title}: {abbreviate(names)}" for title, names in lists.items() if names]
    if problems:
        hint = (
            "; merge adapters first (merge_lora)" if any("lora_" in path for path in flat) else ""
        )
        raise ValueError(f"the parameters do not fit the model. {'. '.join(problems)}{hint}")


def check_replaceable(target: pathlib.Path) -> None:
    """Checks that a path does not exist, or is a folder with a saved model and nothing else.

    Raises:
      ValueError: it holds anything else; names it.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    others = [
        p.name for p in sorted(target.iterdir()) if not any(p.match(name) for name in _MODEL_FILES)
    ]
    if others:
        raise ValueError(
            f"{target} holds {abbreviate(others, 5)}, which a saved model does not; saving "
            f"replaces the whole folder, so give a new one"
        )


def _token_ids(hf: dict[str, Any], tokenizer: Any, config: Any) -> dict[str, Any]:
    """Token ids for a config: the tokenizer's, else the config's own.

    `eos_token_id` has all ids that end an answer (`stop_token_ids`): a number if there is only one.
    """
    ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in hf}
    if tokenizer is None:
        return ids
    for key in ("bos_token_id", "pad_token_id"):
        value = getattr(tokenizer, key)
        if value is not None and value < config.vocab_size:
            ids[key] = value
    listed = [i for i in as_list(ids.get("eos_token_id")) if i < config.vocab_size]
    try:
        template = None if tokenizer.chat_template else NO_TEMPLATE
        stops = stop_token_ids(tokenizer, template, listed=listed)
    except ValueError:  # a template that rejects a conversation of one question and one answer
        stops = stop_token_ids(tokenizer, NO_TEMPLATE, listed=listed)
    # In the order of the existing list, then the others.
    ordered = [*(i for i in listed if i in stops), *(i for i in stops if i not in listed)]
    if ordered:
        ids["eos_token_id"] = ordered[0] if len(ordered) == 1 else ordered
    return ids


def save_tokenizer(tokenizer: Any, folder: pathlib.Path) -> None:
    """The tokenizer in a form that transformers 4 and 5 read."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        # transformers 4 knows only this name; transformers 5 accepts it as an alias.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        # transformers 4 wants an object under this name, and a list under the older one.
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    config.pop("auto_map", None)  # custom code is not exported
    _write_json(path, config)
    _carry_vocabulary(tokenizer, folder)


def _carry_vocabulary(tokenizer: Any, folder: pathlib.Path) -> None:
    """Copies a SentencePiece model from the tokenizer's source, because other tools read it."""
    source = pathlib.Path(str(tokenizer.name_or_path))
    if source.is_dir() and source.resolve() != folder.resolve():
        for path in sorted(source.glob("*.model")):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def swap(finished: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a finished folder to the target; deletes the old folder only after that succeeds."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(finished, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise
    if replaced:
        shutil.rmtree(old)
