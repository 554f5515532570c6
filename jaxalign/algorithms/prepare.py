"""`prepare`: what frozen models add to a batch before the step, with a door for the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Prepare(Generic[Arguments, Batch]):
    """What every `make_prepare` returns. Call it like a function.

    Arguments come in one order, without those that an algorithm has no use for: PRNG key, train
    state, reference parameters, batch.

    Attributes:
      run: the arguments → the batch with what the frozen models add.
      lower: lowers the program that `run` compiles, without running it. Takes the same arguments,
        but abstract: `ShapeDtypeStruct`s with the shardings of the arrays.
    """

    run: Callable[Arguments, Batch]
    lower: Callable[..., jax.stages.Lowered]

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Batch:
        """Runs it."""
        return self.run(*args, **kwargs)
