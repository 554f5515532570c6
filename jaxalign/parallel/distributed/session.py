"""The context for a program that runs on all hosts of a job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from jaxalign.parallel.distributed.collectives import is_main
from jaxalign.parallel.distributed.heartbeat import guard
from jaxalign.parallel.distributed.initialize import start


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the other processes of the job, and fails with them.

    Every process runs the same body. Only the first one prints to standard output. If the body
    raises on one process, the others stop with that message; see `guard`. With a single process,
    this does nothing.

        with distributed.session():
            train(load_config("sft", "sft.yaml"))

    Raises:
      ValueError, RuntimeError: see `start`.
    """
    start()
    with contextlib.ExitStack() as stack:
        if not is_main():
            devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        stack.enter_context(guard())
        yield
