"""Which parameters an optimizer treats as matrices: a stack of layers is many matrices, not one.

Blocks are stacked along a leading axis (and experts along a second one), so that a bias is `[L, D]`
and a kernel `[L, in, out]`. The last two axes of a kernel are the matrix; the axes before are
stacks.
"""

from __future__ import annotations

from typing import Any

_VECTORS = ("scale", "bias")
_MATRICES = ("kernel", "lora_a", "lora_b")
_OUTSIDE = {"embed", "embedding", "embeddings", "head", "lm_head", "score"}


def _keys(path: tuple[Any, ...]) -> set[str]:
    return {str(getattr(key, "key", "")) for key in path}


def leaf_name(path: tuple[Any, ...]) -> str:
    """The last key of a path; "" if it is not a dict key."""
    return str(getattr(path[-1], "key", "")) if path else ""


def is_vector(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a norm's scale, a bias, or a stack of either."""
    return leaf_name(path) in _VECTORS


def matrix_axes(path: tuple[Any, ...], rank: int) -> int:
    """How many of a parameter's last axes belong together: 2 for a matrix, 1 for a vector, or 0.

    Args:
      path: the parameter's path.
      rank: the number of the parameter's axes.
    """
    if is_vector(path):
        return min(rank, 1)
    stacked = "blocks" in _keys(path) and leaf_name(path) not in _MATRICES
    return min(rank - stacked, 2)


def is_hidden_matrix(path: tuple[Any, ...], rank: int) -> bool:
    """Whether a parameter is a matrix between hidden layers, or a stack of them.

    Kernels and the factors of adapters are; embeddings, heads, scales and biases are not.
    """
    return not _keys(path) & _OUTSIDE and rank >= 2 and leaf_name(path) in _MATRICES
