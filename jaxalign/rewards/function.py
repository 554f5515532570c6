"""A reward from a Python function that a config names: `module:function` or `file.py:function`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from jaxalign.rewards.limits import check_timeout
from jaxalign.rewards.specs import (
    BuildContext,
    RewardFunction,
    RewardSpec,
    check_option,
    register_reward,
)
from jaxalign.rewards.text import batch_reward, text_reward


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionReward(RewardSpec):
    """A Python function.

    Attributes:
      path: `module:function`, or `file.py:function`. The current folder is searched for modules
        last.
      calls: "row": called once per answer, see `text_reward`; "batch": once per batch, see
        `batch_reward`.
      timeout: seconds that a call may take; None: no limit.
    """

    kind: str = "function"
    path: str
    calls: str = "row"
    timeout: float | None = 600.0

    def __post_init__(self):
        super().__post_init__()
        module, _, function = self.path.rpartition(":")
        valid = bool(module) and function.isidentifier()
        check_option(valid, "path", self.path, "module:function or file.py:function")
        check_option(self.calls in ("row", "batch"), "calls", self.calls, "row or batch")
        check_timeout("function", self.timeout)

    def build(self, context: BuildContext) -> RewardFunction:
        """The function as a `TextReward`."""
        make = text_reward if self.calls == "row" else batch_reward
        return make(
            import_function(self.path),
            context.tok,
            rows=context.rows,
            name=context.name,
            timeout=self.timeout,
        )


def import_function(path: str) -> Callable[..., Any]:
    """Imports a function by `module:name` or `file.py:name`.

    Raises:
      ValueError: no such module, file or function, or the module calls `sys.exit`.
    """
    try:
        return _import_function(path)
    except SystemExit as error:
        raise ValueError(
            f"reward path={path!r}: it calls sys.exit({error.code!r}) when it is imported; "
            'put that under `if __name__ == "__main__":`'
        ) from error


def _import_function(path: str) -> Callable[..., Any]:
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        file = pathlib.Path(where)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"reward path={path!r}: no such file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        # A console script does not have the current folder on sys.path. Appended last, so that it
        # shadows no installed module.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{where}.".startswith(f"{error.name}."):
                raise  # the module exists, but a module that it imports does not
            raise ValueError(
                f"reward path={path!r}: no module {where!r}; it is looked for among what is "
                "installed and in the current folder"
            ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward path={path!r}: {where!r} has no function {name!r}")
    return function
