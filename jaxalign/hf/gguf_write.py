"""Writes a model as a GGUF file with PyPI's `gguf`: metadata, tokenizer, tensors one at a time."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxalign.hf import families
from jaxalign.hf.blocks import PIECE, Block, Pool, gather_tensor_piece, item_blocks, workers
from jaxalign.hf.families.table import Tensor
from jaxalign.hf.gguf_file import ROPE_FACTORS, GGUFFile, gguf_name, interleave
from jaxalign.hf.gguf_vocabulary import tokenizer_metadata
from jaxalign.hf.save import plan_tensors
from jaxalign.models.base import DecoderConfig, RopeConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.rope import rope_frequencies
from jaxalign.parallel import distributed
from jaxalign.types import Params

ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF's architecture name of a family. In GGUF, Mistral without windows is also a Llama."""
_BLOCK = 32  # elements of a block of Q8_0
_LARGEST = 127 * 65504.0  # the scale of such a block is float16


class _Form(NamedTuple):
    """An element type.

    Attributes:
      dtype: the dtype of the written array; uint8 for blocks.
      file_type: the `gguf.LlamaFileType` of such a file.
    """

    dtype: np.dtype
    file_type: int


FORMS = {
    "F32": _Form(np.dtype(np.float32), 0),
    "F16": _Form(np.dtype(np.float16), 1),
    "BF16": _Form(np.dtype(ml_dtypes.bfloat16), 32),
    "Q8_0": _Form(np.dtype(np.uint8), 7),
}
"""Element types of the matrices; vectors are F32 in every file."""


class _Target(NamedTuple):
    """A tensor of the file: its GGUF name and element type."""

    name: str
    tensor: Tensor
    kind: str


def save_gguf(
    model: Any,
    params: Params,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any,
    dtype: str = "F16",
    name: str = "model",
) -> list[str]:
    """Writes a GGUF file that llama.cpp and `load_pretrained` read.

    The file is written atomically. Host memory holds one tensor at a time, in the file's element
    type. With several processes all call this with the same arguments; they gather the tensors one
    at a time, and process 0 writes.

    Args:
      model: a `Decoder` without adapters.
      params: its parameters, on one device or sharded.
      path: the file's path. An existing GGUF file is replaced; anything else is an error.
      tokenizer: a transformers tokenizer; the file contains it and its chat template.
      dtype: element type of the matrices, one of `FORMS`. With Q8_0, a matrix whose row length is
        not a multiple of 32 is written as F16.
      name: `general.name`.

    Returns:
      The names of the tensors that are F16 in a Q8_0 file.

    Raises:
      ValueError: a model, tokenizer or value that GGUF cannot hold, or another file at `path`.
      RuntimeError: another process failed.
    """
    if dtype not in FORMS:
        raise ValueError(f"gguf dtype={dtype!r}: wanted one of {', '.join(FORMS)}")
    arch = check_architecture(model)
    config: DecoderConfig = model.config
    flat = families.flatten(params)
    targets = [
        _Target(gguf_name(p.tensor.name), p.tensor, _kind(p.tensor, dtype))
        for p in plan_tensors(model, params)
    ]
    vocabulary = tokenizer_metadata(tokenizer, config.vocab_size, arch, config.max_positions)
    target, main = pathlib.Path(path).expanduser().resolve(), distributed.is_main()
    temporary = target.parent / f".{target.name}.{distributed.broadcast_random():08x}.tmp"
    try:
        with distributed.fail_together("writing a GGUF file"):
            if main:
                check_replaceable_file(target)
                target.parent.mkdir(parents=True, exist_ok=True)
        with distributed.fail_together("writing a GGUF file"):
            header = _Header(arch, name, dtype, vocabulary)
            _write(temporary, header, config, targets, flat)
        with distributed.fail_together("writing a GGUF file"):
            if main:
                _check_config(temporary, config)
                os.replace(temporary, target)
    except BaseException:
        if main:
            temporary.unlink(missing_ok=True)
        raise
    return [t.name for t in targets if dtype == "Q8_0" and t.kind == "F16"]


def check_architecture(model: Any) -> str:
    """GGUF's architecture of a model.

    Raises:
      ValueError: none that is written; says which are.
    """
    supported = (
        "GGUF is written for language models of the families llama and mistral, qwen2 and qwen3, "
        "without windows and experts"
    )
    if not isinstance(model, Decoder):
        raise ValueError(f"a reward model or critic has no GGUF form: {supported}; write --to hf")
    config = model.config
    arch = ARCHITECTURE.get(config.family)
    rope = config.rope
    llama3 = (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions)
    problems = {
        f"family {config.family!r}": arch is None,
        f"sliding window {config.window}": config.window is not None,
        f"rope {rope.kind!r}": rope.kind not in ("default", "linear", "llama3"),
        f"llama3 rope with low_freq_factor, high_freq_factor, original positions {llama3}": (
            rope.kind == "llama3" and llama3 != (1.0, 4.0, 8192)
        ),
        "biases of attention in qwen3": arch == "qwen3" and config.qkv_bias,
    }
    wrong = [problem for problem, there in problems.items() if there]
    if wrong or arch is None:
        raise ValueError(f"{wrong[0]} cannot be written: {supported}; write --to hf or orbax")
    return arch


class _Header(NamedTuple):
    arch: str
    name: str
    dtype: str
    vocabulary: dict[str, Any]


def _kind(tensor: Tensor, dtype: str) -> str:
    if len(tensor.shape) < 2:
        return "F32"
    return "F16" if dtype == "Q8_0" and tensor.shape[-1] % _BLOCK else dtype


def check_replaceable_file(target: pathlib.Path) -> None:
    """Raises ValueError if a path holds anything other than a GGUF file."""
    if not target.exists():
        return
    start = b""
    if target.is_file():
        with target.open("rb") as file:
            start = file.read(4)
    if start != b"GGUF":
        raise ValueError(f"{target} is there and no GGUF file; give another path")


def _write(
    path: pathlib.Path,
    header: _Header,
    config: DecoderConfig,
    targets: Sequence[_Target],
    flat: dict[str, Any],
) -> None:
    """Writes the file on process 0; the others take part in its all-gathers."""
    owned, failure, writer = distributed.is_main(), None, None
    divisors = _divisors(config.rope, config.head_dim)
    with workers() as pool:
        try:
            if owned:
                writer = _begin(path, header, config, targets, divisors)
        except (OSError, ValueError) as error:
            failure = error
        for target in targets:
            # Also after an error: the other processes block in these all-gathers.
            blocks = [
                item_blocks(flat[piece.leaf.path], piece.leaf, piece.position, needed=owned)
                for piece in target.tensor.pieces
            ]
            if writer is None or failure is not None:
                continue
            try:
                data = _encode(target, blocks, pool)
                writer.write_tensor_data(_file_order(target, data, config, header.arch))
            except (OSError, ValueError) as error:
                failure = error
    if writer is not None:
        writer.close()
    if failure is not None:
        raise failure


def _begin(
    path: pathlib.Path,
    header: _Header,
    config: DecoderConfig,
    targets: Sequence[_Target],
    divisors: np.ndarray | None,
) -> Any:
    """A writer that has written everything except the weights."""
    import gguf

    writer = gguf.GGUFWriter(path, header.arch)
    writer.add_type("model")
    writer.add_name(header.name)
    writer.add_file_type(FORMS[header.dtype].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    types = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
    types |= {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
    for key, value in header.vocabulary.items():
        writer.add_key_value(key, value, types[type(value)])
    if divisors is not None:
        writer.add_tensor_info(ROPE_FACTORS, divisors.shape, divisors.dtype, divisors.nbytes)
    for target in targets:
        shape, dtype = _stored(target)
        size = int(np.prod(shape)) * dtype.itemsize
        kind = gguf.GGMLQuantizationType[target.kind]
        writer.add_tensor_info(target.name, shape, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    return writer


def _divisors(rope: RopeConfig, head_dim: int) -> np.ndarray | None:
    """The divisors of each frequency in Llama 3's scaling; None without that scaling."""
    if rope.kind != "llama3":
        return None
    plain = rope_frequencies(RopeConfig(theta=rope.theta), head_dim)
    return np.asarray(plain / rope_frequencies(rope, head_dim), np.float32)


def _stored(target: _Target) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the written array."""
    shape, dtype = target.tensor.shape, FORMS[target.kind].dtype
    if target.kind != "Q8_0":
        return shape, dtype
    return (*shape[:-1], shape[-1] // _BLOCK * (_BLOCK + 2)), dtype  # one float16 scale per block


def _encode(target: _Target, blocks: Sequence[Sequence[Block]], pool: Pool) -> np.ndarray:
    """Encodes a tensor in its element type, with rows in Hugging Face's order.

    Raises:
      ValueError: a value that the type cannot hold.
    """
    import gguf

    tensor = target.tensor
    shape, dtype = _stored(target)
    out = np.empty(shape, dtype)

    def encode_rows(rows: slice) -> None:
        if target.kind != "Q8_0":
            fits = gather_tensor_piece(tensor, blocks, rows, out[rows])
        else:
            values = np.empty((rows.stop - rows.start, *tensor.shape[1:]), np.float32)
            gather_tensor_piece(tensor, blocks, rows, values)
            fits = bool(np.all(np.abs(values) < _LARGEST))
            if fits:
                out[rows] = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        if not fits:
            raise ValueError(
                f"{tensor.name} holds values that {target.kind} cannot; write BF16 or F32"
            )

    step = max(1, PIECE // max(1, 4 * int(np.prod(tensor.shape[1:]))))
    count = tensor.shape[0]
    list(pool.map(encode_rows, [slice(i, min(i + step, count)) for i in range(0, count, step)]))
    return out


def _file_order(target: _Target, data: np.ndarray, config: DecoderConfig, arch: str) -> np.ndarray:
    """Rows in the architecture's order: for Llama's queries and keys, that of interleaved rope."""
    heads = {".attn_q.": config.num_heads, ".attn_k.": config.num_kv_heads}
    for part, count in heads.items():
        if arch == "llama" and part in target.name:
            return data[interleave(np.arange(len(data)), count)]
    return data


def _check_config(path: pathlib.Path, config: DecoderConfig) -> None:
    """Reads the written metadata back: a field without a GGUF key would have changed."""
    file = GGUFFile(path)
    try:
        got = families.config_from_hf(file.config)
    finally:
        file.close()
    before, after = families.canonical(config), families.canonical(got)
    lost = [
        f"{name}={before[name]!r} (would come back as {after[name]!r})"
        for name in before
        if name not in ("family", "source_config") and before[name] != after[name]
    ]
    if lost:
        raise ValueError(f"a GGUF file of this kind cannot hold {', '.join(lost)}; write --to hf")
