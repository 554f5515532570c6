"""Options by pattern: regular expressions that are searched for in parameter paths.

A path is the keys of the nested dict, such as `blocks/attention/query/lora_a` or `embed/embedding`.
The first pattern that matches a path decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxalign.types import Params

_SHOWN = 40
"""The most paths that an error message lists."""


def path_of(path: tuple[Any, ...]) -> str:
    """JAX's path of a leaf as one string: `blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_patterns(patterns: Mapping[str, Any], option: str) -> None:
    """Checks that every pattern is a regular expression.

    Raises:
      ValueError: one is not; the message names it and what is wrong.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{option}: {pattern!r} is no regular expression ({error}); wanted one that is "
                "searched in paths such as blocks/mlp/up/kernel"
            ) from error


def by_pattern(params: Params, patterns: Mapping[str, Any], option: str) -> Any:
    """The value for each parameter, by its pattern: a tree like `params`; None where none matches.

    Args:
      params: nested dict of arrays or shapes.
      patterns: regular expression → value.
      option: name of the option, for the message.

    Raises:
      ValueError: a pattern decides for no parameter; lists the paths.
    """
    compiled = {pattern: re.compile(pattern) for pattern in patterns}
    unused, matched, paths = dict.fromkeys(patterns), set(), []

    def decide(path: tuple[Any, ...], _: Any) -> Any:
        name = path_of(path)
        paths.append(name)
        found = [pattern for pattern, regex in compiled.items() if regex.search(name)]
        matched.update(found)
        if not found:
            return None
        unused.pop(found[0], None)
        return patterns[found[0]]

    values = jax.tree_util.tree_map_with_path(decide, params)
    for pattern in unused:
        if pattern in matched:
            raise ValueError(
                f"{option}: all that {pattern!r} matches is decided by patterns before it; put it "
                "in front of them"
            )
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        raise ValueError(
            f"{option}: {pattern!r} matches no trained parameter; there are: "
            f"{', '.join(paths[:_SHOWN])}{more}"
        )
    return values


def update_by_pattern(
    patterns: Mapping[str, Any],
    option: str,
    update_leaf: Callable[[Any, Any, Any], Any],
    default: Callable[[Params], Any],
) -> optax.GradientTransformation:
    """A stateless transformation: (update, parameter, value) → update, for each parameter.

    Args:
      patterns: regular expression → value.
      option: name of the option, for messages.
      update_leaf: transforms one parameter's update.
      default: parameters → a tree of the values where no pattern matches.
    """

    def init(params: Params) -> optax.EmptyState:
        by_pattern(params, patterns, option)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(f"{option} wants the parameters: update(updates, state, params)")
        leaves, tree = jax.tree.flatten(updates)
        given, others = (
            tree.flatten_up_to(x) for x in (by_pattern(params, patterns, option), default(params))
        )
        values = [
            other if value is None else value for value, other in zip(given, others, strict=True)
        ]
        return tree.unflatten(map(update_leaf, leaves, tree.flatten_up_to(params), values)), state

    return optax.GradientTransformation(init, update)
