"""The export formats: where files go, and how they are checked, written and rejected."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxalign.hf import checksums, families, orbax_folder, peft, save_pretrained
from jaxalign.hf.gguf_header import Metadata
from jaxalign.hf.gguf_lora import check_gguf_adapter, save_gguf_adapter
from jaxalign.hf.gguf_vocabulary import tokenizer_metadata, unlisted_ends
from jaxalign.hf.gguf_write import FORMS, check_architecture, save_gguf
from jaxalign.hf.peft_write import check_writable
from jaxalign.hf.safetensors_file import INDEX
from jaxalign.hf.save import check_replaceable, configs, plan_tensors, swap, write_configs
from jaxalign.hf.source import is_adapter
from jaxalign.hf.tensor_table import tensor_table
from jaxalign.parallel import distributed
from jaxalign.types import Params

GGUF_ADAPTER = "adapter.gguf"
"""The file of `gguf-lora` in its folder."""


class Adapted(NamedTuple):
    """A model with its adapters, and their base.

    Attributes:
      model: a `Decoder` or `Scorer`.
      params: base and adapters together.
      base: source of the base.
    """

    model: Any
    params: Params
    base: str


class Whole(NamedTuple):
    """A model in the form to write: without adapters.

    Attributes:
      model: a `Decoder` or `Scorer`.
      params: its parameters.
      tokenizer: with the chat template.
      dtype: dtype of tensors in Hugging Face and Orbax folders, see `save_pretrained`.
      gguf_dtype: dtype of the matrices in a GGUF file, one of `FORMS`.
      name: the model's name, for display.
      adapted: the same model with its adapters, until they are written.
    """

    model: Any
    params: Params
    tokenizer: Any
    dtype: str | None = "source"
    gguf_dtype: str = "F16"
    name: str = "model"
    adapted: Adapted | None = None


class Format(NamedTuple):
    """A format.

    Attributes:
      help: one line.
      source: (folder, model) → what `load_pretrained` reads.
      check: raises ValueError for a model that the format cannot hold.
      write: writes the model into a folder; returns a text for display.
      kinds: leaf path → stored element type.
      weights: patterns of the files in the folder that hold weights.
      counts: for a format of adapters alone: folder → the number of weights of each element type;
        None: the format holds the whole model.
    """

    help: str
    source: Callable[[pathlib.Path, Whole], pathlib.Path]
    check: Callable[[Whole], None]
    write: Callable[[Whole, pathlib.Path], str]
    kinds: Callable[[Whole], dict[str, str]]
    weights: Callable[[Whole], tuple[str, ...]]
    counts: Callable[[pathlib.Path], dict[str, int]] | None = None


# --- Hugging Face --------------------------------------------------------------------------------


def _write_hf(whole: Whole, folder: pathlib.Path) -> str:
    save_pretrained(whole.model, whole.params, folder, tokenizer=whole.tokenizer, dtype=whole.dtype)
    return tensor_table(plan_tensors(whole.model, whole.params, whole.dtype))


def _folder_kinds(whole: Whole) -> dict[str, str]:
    """The narrowest dtype of each leaf's tensors."""
    kinds: dict[str, Any] = {}
    for planned in plan_tensors(whole.model, whole.params, whole.dtype):
        for piece in planned.tensor.pieces:
            others = (planned.dtype, kinds.get(piece.leaf.path, planned.dtype))
            kinds[piece.leaf.path] = min(others, key=lambda dtype: dtype.itemsize)
    return {path: dtype.name for path, dtype in kinds.items()}


# --- Orbax ---------------------------------------------------------------------------------------


def _write_orbax(whole: Whole, folder: pathlib.Path) -> str:
    kinds = _folder_kinds(whole)
    flat = families.flatten(whole.params)
    params = families.unflatten({p: x.astype(jnp.dtype(kinds[p])) for p, x in flat.items()})
    return save_orbax(whole.model, params, folder, tokenizer=whole.tokenizer)


def save_orbax(
    model: Any, params: Params, folder: str | os.PathLike[str], *, tokenizer: Any
) -> str:
    """Writes an Orbax folder atomically, see `jaxalign.hf.orbax_folder`.

    Args:
      model: a `Decoder` without adapters, or a `Scorer`.
      params: its parameters, written in their own dtypes.
      folder: the target, as for `save_pretrained`.
      tokenizer: saved with its chat template.

    Returns:
      The table of tensors.

    Raises:
      ValueError: as `save_pretrained`.
      RuntimeError: another process failed.
    """
    target = pathlib.Path(folder).resolve()
    fresh = target.parent / f".{target.name}.{distributed.broadcast_random():08x}.tmp"
    doing, main = "writing an Orbax folder", distributed.is_main()
    planned = plan_tensors(model, params)
    jsons = configs(model, planned, tokenizer)
    try:
        with distributed.fail_together(doing):
            if main:
                check_replaceable(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh.mkdir()
        with distributed.fail_together(doing):
            orbax_folder.write_params(params, fresh)
        with distributed.fail_together(doing):
            if main:
                write_configs(fresh, jsons, tokenizer)
                checksums.write(fresh)
                swap(fresh, target)
    except BaseException:
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
        raise
    return tensor_table(planned)


# --- GGUF ----------------------------------------------------------------------------------------


def gguf_file(whole: Whole) -> str:
    """The name of the file in its folder."""
    return f"model-{whole.gguf_dtype}.gguf"


def _check_gguf(whole: Whole) -> None:
    if whole.gguf_dtype not in FORMS:
        raise ValueError(f"gguf dtype={whole.gguf_dtype!r}: wanted one of {', '.join(FORMS)}")
    arch, config = check_architecture(whole.model), whole.model.config
    tokenizer_metadata(whole.tokenizer, config.vocab_size, arch, config.max_positions)


def _write_gguf(whole: Whole, folder: pathlib.Path) -> str:
    path = folder / gguf_file(whole)
    exceptions = save_gguf(
        whole.model,
        whole.params,
        path,
        tokenizer=whole.tokenizer,
        dtype=whole.gguf_dtype,
        name=whole.name,
    )
    lines = [f"{path.name}: matrices {whole.gguf_dtype}, vectors F32"]
    if exceptions:
        lines.append(
            f"  {len(exceptions)} matrices are F16, since their rows are no multiple of 32: "
            f"{', '.join(exceptions[:4])}{' …' if len(exceptions) > 4 else ''}"
        )
    ends = unlisted_ends(whole.tokenizer)
    if ends:
        lines.append(f"  GGUF has no key for these ends of an answer: {', '.join(ends)}")
    return "\n".join(lines)


def _gguf_kinds(whole: Whole) -> dict[str, str]:
    dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "Q8_0"}
    kinds = {}
    for leaf in families.leaves(whole.model.config, whole.model.shapes):
        narrow = whole.gguf_dtype == "Q8_0" and leaf.tensor_shape[-1] % 32
        matrix = "float16" if narrow else dtypes[whole.gguf_dtype]
        kinds[leaf.path] = matrix if len(leaf.tensor_shape) > 1 else "float32"
    return kinds


# --- PEFT ----------------------------------------------------------------------------------------


def _adapters_of(whole: Whole, format_name: str) -> Adapted:
    if whole.adapted is None:
        raise ValueError(
            f"--to {format_name}: wanted a run with adapters (model.lora), and there are none "
            "here; --to hf writes a whole model"
        )
    return whole.adapted


def _check_peft(whole: Whole) -> None:
    model, _, base = _adapters_of(whole, "peft")
    check_writable(model)
    path = pathlib.Path(base).expanduser()
    if path.is_dir() and is_adapter(path):
        raise ValueError(
            f"--to peft: the base, model.source={base!r}, is an adapter itself, and PEFT "
            "wants a whole model there; write the merged model with --to hf"
        )


def _write_peft(whole: Whole, folder: pathlib.Path) -> str:
    model, params, base = _adapters_of(whole, "peft")
    path = pathlib.Path(base).expanduser()
    base = str(path.resolve()) if path.exists() else base  # valid wherever the adapter is read from
    peft.save_adapter(model, params, folder, base=base, tokenizer=whole.tokenizer)
    return f"{peft.WEIGHTS}: adapters of {base}"


def _adapter_counts(folder: pathlib.Path) -> dict[str, int]:
    """Element type → how many of an adapter's weights have it, from its file."""
    from safetensors.numpy import load_file

    counts: dict[str, int] = {}
    for tensor in load_file(folder / peft.WEIGHTS).values():
        counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + tensor.size
    return counts


def _own_kinds(whole: Whole) -> dict[str, str]:
    """The merged weights' own dtypes: apart from the base, nothing is rounded."""
    return {path: leaf.dtype.name for path, leaf in families.flatten(whole.params).items()}


# --- adapters as a GGUF file ---------------------------------------------------------------------


def _check_gguf_lora(whole: Whole) -> None:
    try:
        check_gguf_adapter(_adapters_of(whole, "gguf-lora").model)
    except ValueError as error:
        raise ValueError(f"--to gguf-lora: {error}") from error


def _write_gguf_lora(whole: Whole, folder: pathlib.Path) -> str:
    model, params, base = _adapters_of(whole, "gguf-lora")
    # Only its name: the file may be moved anywhere, and the reader is given a base.
    named = pathlib.PurePath(base).name
    save_gguf_adapter(model, params, folder / GGUF_ADAPTER, name=whole.name, base=named)
    return f"{GGUF_ADAPTER}: adapters of {named}, F32"


def _gguf_adapter_counts(folder: pathlib.Path) -> dict[str, int]:
    tensors = Metadata(folder / GGUF_ADAPTER).tensors
    return {"float32": sum(math.prod(tensor.shape) for tensor in tensors)}


FORMATS: Mapping[str, Format] = {
    "hf": Format(
        "a Hugging Face folder",
        lambda folder, _: folder,
        lambda _: None,
        _write_hf,
        _folder_kinds,
        lambda _: ("model*.safetensors", INDEX),
    ),
    "peft": Format(
        "the adapters alone, for PEFT",
        lambda folder, _: folder,
        _check_peft,
        _write_peft,
        _own_kinds,
        lambda _: (peft.WEIGHTS,),
        _adapter_counts,
    ),
    "gguf": Format(
        "a GGUF file",
        lambda folder, whole: folder / gguf_file(whole),
        _check_gguf,
        _write_gguf,
        _gguf_kinds,
        lambda whole: (gguf_file(whole),),
    ),
    "gguf-lora": Format(
        "the adapters alone, for llama.cpp",
        lambda folder, _: folder / GGUF_ADAPTER,
        _check_gguf_lora,
        _write_gguf_lora,
        _own_kinds,
        lambda _: (GGUF_ADAPTER,),
        _gguf_adapter_counts,
    ),
    "orbax": Format(
        "an Orbax folder, which loads without conversion",
        lambda folder, _: folder,
        lambda _: None,
        _write_orbax,
        _folder_kinds,
        lambda _: (orbax_folder.PARAMS,),
    ),
}
"""Format → how it is written. `export` writes `hf` by default."""


def reject(format_name: str, whole: Whole, folder: pathlib.Path) -> list[str]:
    """Renames the files of weights in a folder so that nobody loads them; returns the new names."""
    renamed = []
    for pattern in FORMATS[format_name].weights(whole):
        for path in sorted(folder.glob(pattern)):
            bad = path.with_name(f"{path.name}.rejected")
            if bad.is_dir():
                shutil.rmtree(bad)  # from an earlier export
            path.replace(bad)
            renamed.append(bad.name)
    return renamed
