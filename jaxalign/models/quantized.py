"""A frozen base in 4 or 8 bits: the projections of all blocks as NF4 or int8 (QLoRA).

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E) has 16 values. Each block
of 64 weights in a column of `[in, out]` has one scale, the block's largest absolute value:

    W[i, o] ≈ table[code[i, o]] · scale[i // 64, o]

These are the blocks and codes of bitsandbytes, which stores the transposed matrix. qwix computes
codes and scales, and dequantises them. We pack two codes into a byte, because `uint4` arrays take a
byte per element on a CPU. Embeddings, norms, biases, routers and heads stay in floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.parallel.sharding import constrain
from jaxalign.types import Params

QUANTIZED = ("nf4", "nf4-double", "int8")
"""How a base may be kept. `nf4-double` also keeps NF4's scales in 8 bits; `int8` has a scale for
each output."""

BLOCK = 64
"""The most weights in a block of NF4; the block size divides the matrix's rows."""

SCALES = 256
"""The most scales in a block of `nf4-double`."""

_SMALLEST = 8  # with smaller blocks, NF4's scales would take as much memory as the codes


def require_qwix() -> Any:
    """The package qwix.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ValueError(
            f"a quantised base (model.quantize) needs the package qwix, which is not installed "
            f"({error}); pip install 'jaxalign[quant]'"
        ) from error
    return qwix


def check_kind(kind: str | None, option: str = "quantize") -> None:
    """Raises ValueError for a value that is neither in `QUANTIZED` nor None."""
    if kind is not None and kind not in QUANTIZED:
        raise ValueError(f"{option}={kind!r}: wanted one of {', '.join(QUANTIZED)}, or null")


def block_size(size: int, most: int) -> int:
    """The largest divisor of a size, up to `most`."""
    return next(d for d in range(min(size, most), 0, -1) if size % d == 0)


def quantize(matrix: jax.Array, kind: str) -> Params:
    """A matrix in fewer bits.

    Args:
      matrix: floats `[…, in, out]`.
      kind: one of `QUANTIZED`.

    Returns:
      With "nf4": `packed`, uint8 `[…, in / 2, out]`, whose high half is the code of the even row;
      `scales`, float32 `[…, in / 64, out]`. With "nf4-double": int8 `scales`, float32 `scale_steps`
      `[…, in / 64, out / 256]` and float32 `scale_mean` `[…, 1, 1]`; the scales are then scales ·
      scale_steps + scale_mean. With "int8": `values`, int8 `[…, in, out]`, and `scales`, float32
      `[…, 1, out]`.

    Raises:
      ValueError: NF4 with a matrix whose number of rows is odd or does not divide into blocks.
    """
    check_kind(kind)
    run: Callable[..., Params] = _int8 if kind == "int8" else _nf4
    if kind == "nf4-double":
        run = _double
    for _ in range(matrix.ndim - 2):
        run = jax.vmap(run)
    return run(matrix)


def _int8(matrix: jax.Array) -> Params:
    made = require_qwix().quantize(matrix.astype(jnp.float32), jnp.int8, channelwise_axes=[1])
    return {"values": made.qvalue, "scales": made.scale}


def _nf4(matrix: jax.Array) -> Params:
    rows = matrix.shape[0]
    block = block_size(rows, BLOCK)
    if rows % 2 or block < _SMALLEST:
        raise ValueError(
            f"quantize=nf4: a matrix with {rows} rows does not divide into blocks of {_SMALLEST} "
            f"to {BLOCK} rows; wanted a model whose sizes do, or quantize=int8"
        )
    quantize_column = functools.partial(require_qwix().quantize, qtype="nf4", tiled_axes={0: block})
    # Column by column: qwix would flatten a whole matrix, which gathers its shards.
    made = jax.vmap(quantize_column, in_axes=1, out_axes=1)(matrix.astype(jnp.float32))
    codes = made.qvalue.astype(jnp.uint8).reshape(rows // 2, 2, -1)
    return {"packed": codes[:, 0] << 4 | codes[:, 1], "scales": made.scale}


def _double(matrix: jax.Array) -> Params:
    parts = _nf4(matrix)
    scales = parts["scales"]
    # Summed unsharded, so that the result is bitwise the same for any sharding of the matrix.
    mean = jnp.mean(constrain(scales, "hidden hidden"), keepdims=True)
    blocks = {1: block_size(scales.shape[1], SCALES)}
    made = require_qwix().quantize(scales - mean, jnp.int8, channelwise_axes=[0], tiled_axes=blocks)
    return parts | {"scales": made.qvalue, "scale_steps": made.scale, "scale_mean": mean}


def dequantize(parts: Params, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix that the result of `quantize` represents, computed in float32.

    Returns:
      `[…, in, out]`.
    """
    run: Callable[[Params], jax.Array] = _dequantize_one
    for _ in range(parts["scales"].ndim - 2):
        run = jax.vmap(run)
    return run(parts).astype(dtype)


def _dequantize_one(parts: Params) -> jax.Array:
    qwix, scales = require_qwix(), parts["scales"]
    if "values" in parts:
        return qwix.dequantize(qwix.QArray(parts["values"], scales))
    if "scale_steps" in parts:
        scales = qwix.dequantize(qwix.QArray(scales, parts["scale_steps"])) + parts["scale_mean"]
    packed = parts["packed"]
    codes = jnp.stack([packed >> 4, packed & 15], axis=1).reshape(-1, packed.shape[1])
    array = qwix.QArray(codes, scales, qtype="nf4")
    return jax.vmap(qwix.dequantize, in_axes=1, out_axes=1)(array)  # see `_nf4`


def is_quantized(node: Any) -> bool:
    """Whether a node of a parameter tree is the result of `quantize` (or its axes, or shapes)."""
    return isinstance(node, dict) and ("packed" in node or "values" in node)


def part_axes(axes: str, names: Any) -> dict[str, str]:
    """The logical axes of the parts of a matrix.

    Args:
      axes: the matrix's axes, such as "embed mlp".
      names: the names of its parts.
    """
    *lead, rows, columns = axes.split()
    if "values" in names:
        found = {"values": (rows, columns), "scales": ("scalar", columns)}
    else:
        name, _, unit = rows.partition("/")
        halves = f"{name}/{int(unit) // 2}" if unit and int(unit) % 2 == 0 else name
        # They are few, so every device has all of them if the shards do not divide them.
        few = f"{name}?", f"{columns.partition('/')[0]}?"
        found = {
            "packed": (halves, columns),
            "scales": (few[0], few[1] if "scale_steps" in names else columns),
            "scale_steps": few,
            "scale_mean": ("scalar", "scalar"),
        }
    return {name: " ".join((*lead, *found[name])) for name in names}


def map_floats(function: Callable[[Any], Any], tree: Params) -> Params:
    """Applies a function to all leaves of a parameter tree except those of quantised matrices."""
    if is_quantized(tree):
        return tree
    return {
        name: map_floats(function, value) if isinstance(value, dict) else function(value)
        for name, value in tree.items()
    }


def map_quantized(function: Callable[[Params], Any], tree: Params) -> Params:
    """Replaces every quantised matrix in a parameter tree by a function of it."""
    return {
        name: function(value)
        if is_quantized(value)
        else map_quantized(function, value)
        if isinstance(value, dict)
        else value
        for name, value in tree.items()
    }


class QuantizedKernel(nnx.Module):
    """A quantised matrix in place of a module's `kernel`.

    Args:
      matrix: floats `[in, out]`, or `[E, in, out]` of experts.
      axes: its logical axes.
      kind: one of `QUANTIZED`.
    """

    def __init__(self, matrix: jax.Array, axes: str, kind: str):
        parts = quantize(matrix, kind)
        for name, logical in part_axes(axes, parts).items():
            setattr(self, name, nnx.Param(parts[name], axes=logical))
        self.axes = axes
        self.names = tuple(parts)

    @property
    def parts(self) -> Params:
        """The parts, as `quantize` returns them."""
        return {name: getattr(self, name)[...] for name in self.names}

    def matrix(self, dtype: Any = jnp.float32) -> jax.Array:
        """The dequantised matrix."""
        return dequantize(self.parts, dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """`[B, T, in]` → `[B, T, out]`."""
        return project_quantized(x, self.parts, self.axes)


def make_kernel(matrix: jax.Array, axes: str, kind: str | None) -> Any:
    """A module's kernel: `nnx.Param` of floats, or a `QuantizedKernel`."""
    return nnx.Param(matrix, axes=axes) if kind is None else QuantizedKernel(matrix, axes, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_quantized(x: jax.Array, parts: Params, axes: str) -> jax.Array:
    """`x @ W` for a frozen, quantised W, which gets no gradient.

    The backward pass dequantises again, so the residuals hold W quantised, not in floats.

    Args:
      x: `[B, T, in]`.
      parts: the parts of W, `[in, out]`, as `quantize` returns them.
      axes: W's two logical axes.

    Returns:
      `[B, T, out]`.
    """
    return x @ _whole_rows(parts, axes, x.dtype)


def _project_forward(x: jax.Array, parts: Params, axes: str) -> tuple[jax.Array, Params]:
    return project_quantized(x, parts, axes), parts


def _project_backward(axes: str, parts: Params, dy: jax.Array) -> tuple[jax.Array, None]:
    return dy @ _whole_rows(parts, axes, dy.dtype).T, None


project_quantized.defvjp(_project_forward, _project_backward)


def _whole_rows(parts: Params, axes: str, dtype: Any) -> jax.Array:
    """W, gathered along the axis that FSDP splits: the all-gather sends codes, not floats."""
    gathered = " ".join("hidden" if axis == "embed" else axis for axis in axes.split())
    heavy = "values" if "values" in parts else "packed"
    logical = part_axes(gathered, parts)[heavy]
    return dequantize(parts | {heavy: constrain(parts[heavy], logical)}, dtype)
