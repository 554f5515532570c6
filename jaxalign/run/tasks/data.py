"""A run's training and held-out data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxalign.data import (
    Batches,
    Options,
    Source,
    preference_batches,
    prompt_batches,
    sft_batches,
)
from jaxalign.data.options import BatchOptions
from jaxalign.parallel import distributed
from jaxalign.parallel.sharding import part_of_rows
from jaxalign.run.config.data import DataConfig


def make_data(
    make: Callable[..., Batches[Any]], config: Any, tok: Any, mesh: Mesh | None = None
) -> tuple[Batches[Any], Batches[Any] | None]:
    """Training data of a run, and its held-out data or None; arguments as `section_data`."""
    template, seed = config.model.chat_template, config.run.seed
    data = config.data
    if config.run.epochs is not None:
        data = dataclasses.replace(data, epochs=None)  # the run ends before the data
    return section_data(make, data, tok, chat_template=template, seed=seed, mesh=mesh)


def section_data(
    make: Callable[..., Batches[Any]],
    data: DataConfig,
    tok: Any,
    *,
    chat_template: str | None,
    seed: int,
    mesh: Mesh | None = None,
) -> tuple[Batches[Any], Batches[Any] | None]:
    """The batches of a data section: training batches, and held-out ones or None.

    Every host reads and packs all data, so that all agree on the rows of each batch. Each host
    builds only its own rows.

    Args:
      make: one of the batch functions of `jaxalign.data`.
      data: the section, `data` or `ptx`.
      tok: the run's tokenizer.
      chat_template: the run's.
      seed: the run's.
      mesh: determines this host's rows; None: all rows.
    """
    host = (0, 1) if mesh is None else part_of_rows(mesh)
    shared = {field.name: getattr(data, field.name) for field in dataclasses.fields(BatchOptions)}
    options = Options(**shared, chat_template=chat_template, seed=seed, host=host)
    kind: dict[str, Any] = {}
    if make is sft_batches:
        kind["train_on"] = data.train_on
    if make is preference_batches:
        kind["shared_prefix"] = data.shared_prefix
    if make is prompt_batches and data.packing:
        raise ValueError("data.packing=true: prompts for rollouts are not packed; leave it out")
    train = make(data.train, tok, options=options, **kind)
    held_out = None
    if data.eval or data.validation is not None:
        # One pass over all of it, in order and in memory.
        once = dataclasses.replace(
            options, epochs=1, shuffle=False, temperature=None, streaming=False
        )
        if data.eval:
            once = dataclasses.replace(once, dedup=None)
            held_out = make(data.eval, tok, options=once, **kind)
        else:
            once = dataclasses.replace(once, split="validation")
            held_out = make(_whole(data.train), tok, options=once, **kind)
    facts = {"data.train": train.checksum, "held-out data": held_out and held_out.checksum}
    distributed.check_consistent("the data (by its checksum)", facts)
    return train, held_out


def _whole(sources: Sequence[str | Source]) -> list[str | Source]:
    """Sources without their weights and numbers of rows.

    These only affect training; all rows that `validation` holds out are evaluated.
    """
    return [
        source
        if isinstance(source, str)
        else dataclasses.replace(source, weight=None, rows=None, epochs=None)
        for source in sources
    ]


def names_of(batches: Batches[Any] | None) -> tuple[str, ...]:
    """The sources for which metrics are also logged."""
    return () if batches is None else batches.sources


def total_of(config: Any, batches: Batches[Any]) -> int:
    """The total batches of the run: by `run.epochs` or `run.steps`, or all of the data."""
    run = config.run
    if run.epochs is not None:
        assert batches.per_epoch is not None
        return max(1, math.ceil(round(run.epochs * batches.per_epoch, 6)))
    if config.data.epochs is None or config.data.streaming:
        return run.steps
    have = len(batches)
    if run.steps is not None and run.steps > have and distributed.is_main():
        print(
            f"run.steps={run.steps}: the data ends after {have} steps, and the run with it "
            f"(data.epochs={config.data.epochs}); data.epochs=null repeats the data"
        )
    return have if run.steps is None else min(run.steps, have)
