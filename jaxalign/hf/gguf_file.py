"""Reads GGUF files: metadata as a Hugging Face config, tensors under their Hugging Face names.

Quantised tensors are dequantised to float32 when they are read, a few rows at a time.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from jaxalign.hf.gguf_header import Metadata, Tensor, block_size
from jaxalign.hf.source import dtypes_to_remember
from jaxalign.models.base import RopeConfig
from jaxalign.models.rope import rope_frequencies

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""The values of `general.architecture` that can be read and written."""
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor with a divisor for each rotary frequency, as in Llama 3's files."""

# `gguf.GGMLQuantizationType` of the unquantised types F32, F16, BF16 and F64.
_UNQUANTISED = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    30: np.dtype(ml_dtypes.bfloat16),
    28: np.dtype(np.float64),
}


class GGUFFile:
    """The tensors of a GGUF file under their Hugging Face names.

    Attributes:
      path: the file.
      config: the metadata as a Hugging Face `config.json`.
      shapes: HF tensor name → shape. A tensor without an HF name keeps its GGUF name.
      dtypes: tensor name → dtype that `read` returns: float32 for a quantised tensor.
      problems: empty; part of the interface of a source.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        metadata = Metadata(path)
        self.problems: dict[str, str] = {}
        if metadata.get("general.type") == "adapter":
            raise ValueError(
                f"{path} holds an adapter and no whole model; give its base too: --adapter {path} "
                "beside the model, load_pretrained(…, base=…) or load_adapter"
            )
        self._tensors = {hf_name(tensor.name): tensor for tensor in metadata.tensors}
        if len(self._tensors) < len(metadata.tensors):
            raise ValueError(f"{path}: two of its tensors have the same Hugging Face name")
        self._file: int | None = os.open(path, os.O_RDONLY)
        self.config = self._config(metadata)
        self._tensors.pop(ROPE_FACTORS, None)  # part of the config
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {
            name: _UNQUANTISED.get(tensor.kind, np.dtype(np.float32))
            for name, tensor in self._tensors.items()
        }
        self._heads = {}
        if self.config["model_type"] == "llama":
            self._heads = {
                "q_proj": self.config["num_attention_heads"],
                "k_proj": self.config["num_key_value_heads"],
            }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a tensor that `index` selects, dequantised to float32 if it is quantised.

        GGUF stores the query and key rows of the llama architecture for interleaved rope; they are
        returned in Hugging Face's order, for rope on half-split heads.
        """
        tensor = self._tensors[name]
        if len(tensor.shape) < 2:
            vector = self._rows(tensor._replace(shape=(1, *tensor.shape)), 0, 1)[0]
            return vector[self._order(name, index)]
        order = self._order(name, index)[0]
        if isinstance(order, slice):
            first, last, _ = order.indices(tensor.shape[0])
            return self._rows(tensor, first, last)[(slice(None), *index[1:])]
        if not order.size:
            return np.empty((0, *tensor.shape[1:]), np.float32)[(slice(None), *index[1:])]
        first, last = int(order.min()), int(order.max()) + 1
        return self._rows(tensor, first, last)[order - first][(slice(None), *index[1:])]

    @property
    def source_dtypes(self) -> dict[str, str]:
        """The dtypes to remember, see `jaxalign.hf.source.SOURCE_DTYPES`."""
        return dtypes_to_remember(self.dtypes)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _order(self, name: str, index: tuple[slice, ...]) -> tuple[Any, ...]:
        """`index`, with HF rows replaced by the rows of the file."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return index
        rows = split_halves(np.arange(self.shapes[name][0]), heads)[index[0]]
        return (rows, *index[1:])

    def _rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of a tensor, dequantised."""
        return read_rows(self._open(), self.path, tensor, first, last)

    def _open(self) -> int:
        if self._file is None:
            raise RuntimeError(f"{self.path} is closed")
        return self._file

    def _config(self, metadata: Metadata) -> dict[str, Any]:
        try:
            factors = None
            if ROPE_FACTORS in self._tensors:
                stored = self._tensors[ROPE_FACTORS]
                factors = self._rows(stored._replace(shape=(1, *stored.shape)), 0, 1)
                factors = factors.astype(np.float32).reshape(-1)
            return _config(metadata, self._tensors, factors)
        except BaseException:
            self.close()
            raise


def read_rows(file: int, path: pathlib.Path, tensor: Tensor, first: int, last: int) -> np.ndarray:
    """Rows of a tensor, dequantised to float32 if it is quantised.

    Args:
      file: descriptor of the open file.
      path: the file's path, for messages.
      tensor: the tensor.
      first, last: read rows `first` up to, but not including, `last`.

    Raises:
      ValueError: the file became shorter, or the type cannot be dequantised.
    """
    import gguf

    numbers, size = block_size(tensor)
    row = math.prod(tensor.shape[1:]) // numbers * size
    raw = np.frombuffer(os.pread(file, (last - first) * row, tensor.start + first * row), np.uint8)
    if raw.size < (last - first) * row:
        raise ValueError(f"{path} became shorter while it was read")
    shape = (last - first, *tensor.shape[1:])
    if tensor.kind in _UNQUANTISED:
        return raw.view(_UNQUANTISED[tensor.kind]).reshape(shape)
    kind = gguf.GGMLQuantizationType(tensor.kind)
    try:
        values = gguf.quants.dequantize(raw.reshape(-1, tensor.shape[-1] // numbers * size), kind)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{path}: tensor {tensor.name} of type {kind.name} cannot be dequantised: {error}"
        ) from error
    return values.astype(np.float32, copy=False).reshape(shape)


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; one without such a name keeps its own."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{kind}"
    return name


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of `ARCHITECTURES`.

    Args:
      name: its Hugging Face name.

    Raises:
      ValueError: no such tensor in these architectures.
    """
    stem, _, kind = name.rpartition(".")
    for gguf, hf in _TOP.items():
        if stem == hf:
            return f"{gguf}.{kind}"
    block = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", stem)
    for gguf, hf in _BLOCK.items():
        if block and block[2] == hf:
            return f"blk.{block[1]}.{gguf}.{kind}"
    raise ValueError(f"tensor {name} has no name in GGUF's {', '.join(ARCHITECTURES)}")


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permutes rows of each head from (0, 1, …, h, h+1, …) to (0, h, 1, h+1, …), h = head_dim/2.

    It is the inverse of the permutation used when reading the llama architecture's queries and
    keys.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permutes rows of each head from (0, h, 1, h+1, …) to (0, 1, …, h, h+1, …), h = head_dim/2."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(
    metadata: Metadata, tensors: dict[str, Tensor], factors: np.ndarray | None
) -> dict[str, Any]:
    where = metadata.path
    arch = metadata.need("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{where}: general.architecture={arch!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    for key, neutral in (
        ("split.count", (None, 0, 1)),
        (f"{arch}.expert_count", (None, 0)),
        (f"{arch}.attention.sliding_window", (None, 0)),
    ):
        if metadata.get(key) not in neutral:
            raise ValueError(
                f"{where}: {key}={metadata.get(key)} is not supported; wanted a dense model with "
                f"full attention in one file"
            )
    heads = metadata.need(f"{arch}.attention.head_count")
    hidden = metadata.need(f"{arch}.embedding_length")
    if not isinstance(heads, int):
        raise ValueError(f"{where}: {arch}.attention.head_count differs by layer: not supported")
    config = {
        "model_type": arch,
        "vocab_size": _vocab_size(metadata, tensors),
        "hidden_size": hidden,
        "intermediate_size": metadata.need(f"{arch}.feed_forward_length"),
        "num_hidden_layers": metadata.need(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{arch}.attention.key_length", hidden // heads),
        "rms_norm_eps": _decimal(metadata.need(f"{arch}.attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": metadata.need(f"{arch}.context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    rotated = metadata.get(f"{arch}.rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        raise ValueError(
            f"{where}: {arch}.rope.dimension_count={rotated} is not supported; wanted the whole "
            f"head, {config['head_dim']}"
        )
    if arch == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    config["rope_parameters"] = _rope(metadata, arch, config["head_dim"], factors)
    for hf_name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if token is not None:
            config[f"{hf_name}_token_id"] = token
    return config


def _vocab_size(metadata: Metadata, tensors: dict[str, Tensor]) -> int:
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError(f"{metadata.path}: tensor token_embd.weight is missing")
    return embedding.shape[0]


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(
    metadata: Metadata, arch: str, head_dim: int, factors: np.ndarray | None
) -> dict[str, Any]:
    theta = _decimal(metadata.get(f"{arch}.rope.freq_base", 10000.0))
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if factors is not None:
        return _llama3(metadata, theta, head_dim, factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        factor = _decimal(metadata.need(f"{arch}.rope.scaling.factor"))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise ValueError(
        f"{metadata.path}: {arch}.rope.scaling.type={kind!r} is not supported; supported: none, "
        f"linear, and the factors of Llama 3"
    )


def _llama3(metadata: Metadata, theta: float, head_dim: int, stored: np.ndarray) -> dict[str, Any]:
    """Recovers Llama 3's rope scaling from the divisor per frequency that GGUF stores instead.

    The lowest frequency is divided by exactly `factor`. The other three parameters are the same in
    all Llama 3 releases; the stored divisors are checked against them.
    """
    plain = RopeConfig(theta=theta)
    scaled = RopeConfig(
        theta=theta,
        kind="llama3",
        factor=float(np.round(stored.max(), 3)),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    expected = rope_frequencies(plain, head_dim) / rope_frequencies(scaled, head_dim)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise ValueError(
            f"{metadata.path}: {ROPE_FACTORS} does not follow Llama 3's scaling with "
            f"low_freq_factor 1, high_freq_factor 4 and 8192 original positions: not supported"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": scaled.factor,
        "low_freq_factor": scaled.low_freq_factor,
        "high_freq_factor": scaled.high_freq_factor,
        "original_max_position_embeddings": scaled.original_max_positions,
    }
