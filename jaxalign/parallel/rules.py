"""Logical axes, and the one table that maps them to mesh axes.

Parameters and activations name *logical* axes ("embed", "mlp", "rows", …), never mesh axes.
Changing a layout means changing the table, never a model: `use_rules` puts other entries into it
for a while, and what is jitted is traced anew under another table.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Every mesh axis, the one whose devices talk most last: neighbours on most machines."""

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # activations
    "rows": ("data", "fsdp", "expert"),
    "length": "sequence",
    "new": None,
    "hidden": None,
    "vocab_logits": "tensor",
    # the key-value cache of decoding
    "cache_rows": ("data", "fsdp", "expert"),
    "cache_heads": "tensor",
    "cache_length": None,
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "router": None,
    "positions": None,
    "norm": None,
    "rank": None,
    "scalar": None,
}
"""Logical axis → mesh axis (or axes). Every logical name used anywhere is listed here.

Mesh axes that a mesh lacks split nothing. "length" is time where a whole row is read at once, "new"
time where tokens are added to a cache. "new" and "hidden" are whole on every device, always. Where
other entries say nothing of it, "cache_rows" is as "rows" and "cache_heads" as "kv_heads".
"""

_FOLLOWS = {"cache_rows": "rows", "cache_heads": "kv_heads"}

_ALWAYS_WHOLE = ("new", "hidden")

_Entries = tuple[tuple[str, tuple[str, ...]], ...]

# Part of the key under which JAX keeps traced and compiled functions.
_over = jax.make_user_context(default_value=())


def current_rules() -> Rules:
    """The table that holds now: `RULES`, with the entries of `use_rules` around this call."""
    return _with(_over.value)


@contextlib.contextmanager
def use_rules(over: Rules | None) -> Iterator[None]:
    """Puts other entries into the table, on top of those that hold now; None: none.

    Args:
      over: logical axis → mesh axis, several, or None (whole on every device).

    Raises:
      ValueError: see `check_rules`.
    """
    if not over:
        yield
        return
    check_rules(over)
    entries = dict(_over.value) | {name: _several(target) for name, target in over.items()}
    with _over(tuple(sorted(entries.items()))):
        yield


def keep_rules() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes contexts in which the table is what it is now, whatever is around them."""
    return functools.partial(_over, _over.value)


def check_rules(over: Rules) -> None:
    """Refuses entries that mean nothing.

    Raises:
      ValueError: which entry, and what is known.
    """
    for name, target in over.items():
        if name in _ALWAYS_WHOLE or name not in RULES:
            known = [axis for axis in RULES if axis not in _ALWAYS_WHOLE]
            raise ValueError(
                f"rule {name}={target!r}: no such logical axis{_near(name, known)}; "
                f"known: {', '.join(known)}"
            )
        axes = _several(target)
        for axis in axes:
            if axis not in MESH_AXES:
                raise ValueError(
                    f"rule {name}={target!r}: no such mesh axis {axis!r}{_near(axis, MESH_AXES)}; "
                    f"wanted null, or one or more of {', '.join(MESH_AXES)}"
                )
        if len(set(axes)) < len(axes):
            raise ValueError(f"rule {name}={target!r}: wanted each mesh axis once")


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _several(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target or ())


@functools.lru_cache(maxsize=64)
def _with(over: _Entries) -> Rules:
    if not over:
        return RULES
    table = dict(RULES) | dict(over)
    followed = {name: table[other] for name, other in _FOLLOWS.items() if name not in dict(over)}
    return types.MappingProxyType(table | followed)
