"""Writes and reads adapters as GGUF files, in the form of llama.cpp's `convert_lora_to_gguf.py`.

A file has `general.type` "adapter", `adapter.type` "lora" and `adapter.lora.alpha`. For each
adapted matrix it has A `[r, in]` and B `[out, r]`, named after the matrix with `.lora_a` and
`.lora_b`. llama.cpp adds

    α/r · B·A

to the matrix, with that matrix's r. Rows of B have the same order as the rows of the matrix: for
Llama's queries and keys they are interleaved. A of the embedding is transposed, `[V, r]`.
"""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.hf.gguf_file import gguf_name, hf_name, interleave, read_rows, split_halves
from jaxalign.hf.gguf_header import Metadata
from jaxalign.hf.gguf_write import ARCHITECTURE, check_architecture, check_replaceable_file
from jaxalign.hf.peft_config import scale_of
from jaxalign.hf.peft_write import PREFIX, adapter_tensors
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import adapted_matrices
from jaxalign.parallel import distributed
from jaxalign.types import Params

_EMBEDDING = "model.embed_tokens"
_ENDS = {"a": ".lora_a", "b": ".lora_b"}


def check_gguf_adapter(model: Any) -> str:
    """The GGUF architecture of a model whose adapters can be written.

    Raises:
      ValueError: adapters that llama.cpp's format cannot hold, or a model that GGUF cannot hold.
    """
    arch = check_architecture(model)
    lora = model.lora
    if lora is None:
        raise ValueError("the model has no adapters to write")
    heads = {path[0] for path in adapted_matrices(model, lora)} & {"embed", "head"}
    problems = {
        "dora=true": lora.dora,
        "init=pissa, which changes the base": lora.init == "pissa",
        f"modules_to_save={list(lora.modules_to_save)}": bool(lora.modules_to_save),
        "an adapter of a tied embedding or head": bool(heads) and model.config.tie_embeddings,
    }
    wrong = [problem for problem, there in problems.items() if there]
    if wrong:
        raise ValueError(
            f"adapters with {wrong[0]} have no GGUF form; write the merged model with --to gguf"
        )
    return arch


def save_gguf_adapter(
    model: Decoder,
    params: Params,
    path: str | os.PathLike[str],
    *,
    name: str = "adapter",
    base: str | None = None,
) -> None:
    """Writes a model's adapters as a GGUF file, which llama.cpp applies to its base (`--lora`).

    Tensors are float32. The file is written atomically. With several processes all must call this
    with the same arguments; process 0 writes.

    Args:
      model: a model with adapters.
      params: base and adapters together (`combine(params, frozen)`), on one device or sharded.
      path: the file's path. An existing GGUF file is replaced; anything else is an error.
      name: `general.name`.
      base: the base's name, for users.

    Raises:
      ValueError: see `check_gguf_adapter`; or another file at `path`.
      RuntimeError: another process failed.
    """
    arch = check_gguf_adapter(model)
    config, tensors = adapter_tensors(model, params, None)
    alpha, named = _to_gguf(config, tensors, model.config, arch)
    target, main = pathlib.Path(path).expanduser().resolve(), distributed.is_main()
    temporary = target.parent / f".{target.name}.{distributed.broadcast_random():08x}.tmp"
    try:
        with distributed.fail_together("writing a GGUF adapter"):
            if main:
                check_replaceable_file(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(temporary, arch, name, base, alpha, named)
                os.replace(temporary, target)
    except BaseException:
        if main:
            temporary.unlink(missing_ok=True)
        raise


def _to_gguf(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shape: DecoderConfig, arch: str
) -> tuple[float, dict[str, np.ndarray]]:
    """(α, tensors by their GGUF names) of an adapter in PEFT's form."""
    modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        stem, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        modules[stem][part[-1].lower()] = np.asarray(tensor, np.float32)
    # Each module needs its own α, so that α/r is its scale. The file has a single α; in other
    # modules B absorbs the rest.
    alphas = {
        stem: scale_of(config, stem, len(parts["a"])) * len(parts["a"])
        for stem, parts in modules.items()
    }
    alpha = float(np.float32(collections.Counter(alphas.values()).most_common(1)[0][0]))
    found = {}
    for stem, parts in modules.items():
        a, b = parts["a"], parts["b"]
        if alphas[stem] != alpha:
            b = b * np.float32(alphas[stem] / alpha)
        heads = _heads(stem, shape, arch)
        whole = gguf_name(f"{stem}.weight")
        found[f"{whole}.lora_a"] = np.ascontiguousarray(a.T) if stem == _EMBEDDING else a
        found[f"{whole}.lora_b"] = b if heads is None else interleave(b, heads)
    return alpha, found


def _heads(module: str, shape: DecoderConfig, arch: str) -> int | None:
    """The number of heads whose rows the architecture interleaves; None: no interleaving."""
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}
    return heads.get(module.rpartition(".")[2]) if arch == "llama" else None


def _write(
    path: pathlib.Path,
    arch: str,
    name: str,
    base: str | None,
    alpha: float,
    tensors: Mapping[str, np.ndarray],
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor, value in tensors.items():
        writer.add_tensor(tensor, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_gguf_adapter(path: pathlib.Path) -> bool:
    """Whether a path is a GGUF file with an adapter."""
    return path.is_file() and Metadata(path).get("general.type") == "adapter"


def read_gguf_adapter(
    path: pathlib.Path, model: Decoder
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a GGUF file of an adapter.

    Args:
      path: the file's path.
      model: the base, which determines the row order of queries and keys.

    Returns:
      (`adapter_config.json`, tensors without prefix), in PEFT's form.

    Raises:
      ValueError: a whole model, another kind of adapter or architecture, or tensors that are not
        A and B.
    """
    metadata = Metadata(path)
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != wanted:
            raise ValueError(f"{path}: {key}={metadata.get(key)!r}, wanted {wanted!r}")
    arch, family = metadata.need("general.architecture"), model.config.family
    if arch != ARCHITECTURE.get(family):
        raise ValueError(
            f"{path}: the adapter does not fit the base: it is one of a model of GGUF's "
            f"architecture {arch!r}, and the base is of the family {family!r}; give the base that "
            "the adapter was made for"
        )
    if metadata.get("adapter.alora.invocation_tokens"):
        raise ValueError(f"{path}: adapter.alora.invocation_tokens (activated LoRA) not supported")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    file = os.open(path, os.O_RDONLY)
    try:
        for tensor in metadata.tensors:
            whole, end, part = tensor.name.rpartition(".lora_")
            stem = hf_name(whole).removesuffix(".weight")
            if end == "" or part not in _ENDS or len(tensor.shape) != 2 or stem == whole:
                raise ValueError(
                    f"{path}: tensor {tensor.name} is no A or B of an adapter (….lora_a, ….lora_b "
                    f"of a matrix of {arch})"
                )
            value = read_rows(file, path, tensor, 0, tensor.shape[0]).astype(np.float32)
            heads = _heads(stem, model.config, arch)
            if part == "b" and heads is not None:
                if len(value) % (2 * heads):
                    raise ValueError(
                        f"{path}: the adapter does not fit the base: {tensor.name} has "
                        f"{len(value)} rows, wanted those of {heads} heads"
                    )
                value = split_halves(value, heads)
            embedding = stem == _EMBEDDING
            if part == "a":
                value = value.T if embedding else value
                ranks[stem] = len(value)
            kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
            tensors[f"{stem}.{kind.format(part.upper())}"] = value
    finally:
        os.close(file)
    # llama.cpp takes α = 0 as a scale of 1.
    alpha = float(metadata.get("adapter.lora.alpha", 0.0))
    config = {
        "peft_type": "LORA",
        "r": max(ranks.values(), default=1),
        "lora_alpha": alpha or 1.0,
        "alpha_pattern": {} if alpha else ranks,
        "target_modules": list(ranks),
    }
    return config, tensors
