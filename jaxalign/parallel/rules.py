"""Sharding rules: the one table that maps logical axes to mesh axes.

Parameters and activations name *logical* axes ("embed", "mlp", "rows", …), never mesh axes. To
change a layout, change the table, not the model. `use_rules` overrides entries within a context;
jitted functions are retraced under other rules.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Mesh axes, from least to most communication: devices along the last are neighbours."""

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
"""Logical axis → mesh axis, several, or None (replicated). It lists every logical axis.

- A mesh axis that the mesh lacks splits nothing.
- `length` is time in a forward pass over whole rows; `new` is time of tokens appended to a cache.
- `new` and `hidden` are always replicated; no rule may split them.
- `cache_rows` defaults to `rows` and `cache_heads` to `kv_heads`: a rule for the latter changes
  both, unless there is a rule for the former.
"""

_DEFAULTS_TO = {"cache_rows": "rows", "cache_heads": "kv_heads"}

_ALWAYS_REPLICATED = ("new", "hidden")

SEQUENCE_ATTENTION = ("auto", "gather", "ring", "ulysses")
"""How queries meet the keys and values that the shards of `length` hold: see
`models.attention.exchange`."""

_Entries = tuple[tuple[str, tuple[str, ...]], ...]

# Overrides in effect; part of the key of JAX's caches of traced and compiled functions.
_overrides = jax.make_user_context(default_value=())
_sequence_attention = jax.make_user_context(default_value="auto")


def current_rules() -> Rules:
    """The rules in effect: `RULES` with the overrides of the enclosing `use_rules`."""
    return _with_overrides(_overrides.value)


def current_sequence_attention() -> str:
    """The value of `SEQUENCE_ATTENTION` that the enclosing `use_rules` sets."""
    return _sequence_attention.value


@contextlib.contextmanager
def use_rules(over: Rules | None, *, sequence_attention: str | None = None) -> Iterator[None]:
    """Context that overrides entries of the rules in effect; with None it does nothing.

    Args:
      over: logical axis → mesh axis, several, or None (replicated).
      sequence_attention: one of `SEQUENCE_ATTENTION`; None: unchanged.

    Raises:
      ValueError: see `check_rules` and `check_sequence_attention`.
    """
    entries = dict(_overrides.value)
    if over:
        check_rules(over)
        entries |= {name: _as_tuple(axes) for name, axes in over.items()}
    asked = _sequence_attention.value if sequence_attention is None else sequence_attention
    check_sequence_attention(asked)
    with _overrides(tuple(sorted(entries.items()))), _sequence_attention(asked):
        yield


def capture_rules() -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Captures the rules in effect: the result makes contexts that restore them."""
    entries, asked = _overrides.value, _sequence_attention.value

    @contextlib.contextmanager
    def restored() -> Iterator[None]:
        with _overrides(entries), _sequence_attention(asked):
            yield

    return restored


def check_sequence_attention(asked: str) -> None:
    """Raises ValueError for an unknown kind of exchange.

    Raises:
      ValueError: it is not one of `SEQUENCE_ATTENTION`.
    """
    if asked not in SEQUENCE_ATTENTION:
        raise ValueError(
            f"sequence_attention={asked!r}: wanted one of {', '.join(SEQUENCE_ATTENTION)}"
        )


def check_rules(over: Rules) -> None:
    """Checks overrides.

    Raises:
      ValueError: an unknown logical or mesh axis, or a mesh axis given twice.
    """
    for name, target in over.items():
        if name in _ALWAYS_REPLICATED or name not in RULES:
            known = [axis for axis in RULES if axis not in _ALWAYS_REPLICATED]
            raise ValueError(
                f"rule {name}={target!r}: no such logical axis{_near(name, known)}; "
                f"known: {', '.join(known)}"
            )
        axes = _as_tuple(target)
        for axis in axes:
            if axis not in MESH_AXES:
                raise ValueError(
                    f"rule {name}={target!r}: no such mesh axis {axis!r}{_near(axis, MESH_AXES)}; "
                    f"wanted null, or one or more of {', '.join(MESH_AXES)}"
                )
        if len(set(axes)) < len(axes):
            raise ValueError(f"rule {name}={target!r}: wanted each mesh axis once")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _as_tuple(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target or ())


@functools.lru_cache(maxsize=64)
def _with_overrides(entries: _Entries) -> Rules:
    if not entries:
        return RULES
    over = dict(entries)
    table = dict(RULES) | over
    defaults = {name: table[other] for name, other in _DEFAULTS_TO.items() if name not in over}
    return types.MappingProxyType(table | defaults)
