"""`prepare`: adds frozen models' outputs to a batch before the step; can be lowered for `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Batch = TypeVar("Batch")

ARGUMENTS = ("key", "state", "ref_params", "batch")
"""The arguments that a `prepare` may take, in order."""


@dataclasses.dataclass(frozen=True)
class Prepare(Generic[Arguments, Batch]):
    """The result of every `make_prepare`. Call it like a function.

    Arguments come in one order: PRNG key, train state, reference parameters, batch. You may leave
    out arguments that the algorithm does not use. If all four are given, it ignores those, so that
    one loop serves all algorithms.

        batch = prepare(key, state, ref_params, batch)

    Attributes:
      run: the arguments → the batch with the frozen models' outputs added.
      lower: lowers the program that `run` compiles, without running it. It takes the same arguments
        as abstract values: `ShapeDtypeStruct`s with the arrays' shardings.
      reads: which of `ARGUMENTS` `run` takes; None: it has its own arguments.
    """

    run: Callable[Arguments, Batch]
    lower: Callable[..., jax.stages.Lowered]
    reads: tuple[str, ...] | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Batch:
        """Runs `prepare`."""
        if self.reads is None:
            return self.run(*args, **kwargs)
        unread = set(ARGUMENTS) - set(self.reads)
        if len(args) == len(ARGUMENTS) and unread:
            named = zip(ARGUMENTS, args, strict=True)
            args = tuple(x for name, x in named if name in self.reads)  # pyrefly: ignore
        named = {name: x for name, x in kwargs.items() if name not in unread}
        return self.run(*args, **named)  # pyrefly: ignore
