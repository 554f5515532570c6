"""The data of a run: what it trains on and what it holds out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jaxalign.data import (
    Batches,
    graded_batches,
    preference_batches,
    prompt_batches,
    ranked_batches,
    sft_batches,
    step_batches,
    unpaired_batches,
)
from jaxalign.parallel import distributed
from jaxalign.parallel.sharding import part_of_rows
from jaxalign.run.config.runs import DataConfig, DPORun, KTORun, PPORun, RewardRun, SFTRun
from jaxalign.run.export import run_tokenizer


def load_data(config: Any) -> tuple[Any, Batches[Any], Batches[Any] | None]:
    """Tokenizer, training and held-out data of a run as it would see them; loads no model."""
    makers: dict[type, Callable[..., Batches[Any]]] = {
        SFTRun: sft_batches,
        DPORun: preference_batches,
        KTORun: unpaired_batches,
        PPORun: prompt_batches,
    }
    make = judgements(config) if isinstance(config, RewardRun) else makers[type(config)]
    tok = run_tokenizer(config.model)
    return tok, *make_data(make, config, tok)


def judgements(config: RewardRun) -> Callable[..., Batches[Any]]:
    """What makes the batches that a reward model's objective learns from."""
    if config.reward.objective == "regression":
        return functools.partial(graded_batches, attributes=config.reward.attributes)
    if config.reward.objective == "ranking":
        return functools.partial(ranked_batches, answers=config.answers)
    return step_batches if config.reward.objective == "steps" else preference_batches


def make_data(
    make: Callable[..., Batches[Any]], config: Any, tok: Any, mesh: Mesh | None = None
) -> tuple[Batches[Any], Batches[Any] | None]:
    """Training data, and held-out data or None.

    Every host reads and lays out all data, so that all know which rows belong to which batch, and
    builds the rows that it holds of each.

    Args:
      make: what makes the batches.
      config: of the run.
      tok: its tokenizer.
      mesh: which says what this host holds; None: everything.
    """
    data: DataConfig = config.data
    shape: dict[str, Any] = {
        "rows": data.rows,
        "length": data.length,
        "chat_template": config.model.chat_template,
        "keep": data.keep,
        "on_error": data.on_error,
        "min_tokens": data.min_tokens,
        "max_tokens": data.max_tokens,
        "scripts": data.scripts if data.scripts else None,
        "script_share": data.script_share,
        "buckets": data.buckets,
        "prefetch": data.prefetch,
        "seed": config.run.seed,
        "host": (0, 1) if mesh is None else part_of_rows(mesh),
    }
    if make is sft_batches:
        shape["train_on"] = data.train_on
    if make is preference_batches:
        shape["shared_prefix"] = data.shared_prefix
    if make is not prompt_batches:
        shape["packing"] = data.packing
    elif data.packing:
        raise ValueError("data.packing=true: prompts for rollouts are not packed; leave it out")
    copies = {"dedup": data.dedup, "dedup_threshold": data.dedup_threshold}
    if data.validation is not None:
        shape["validation"] = data.validation
    train = make(
        data.train,
        tok,
        epochs=data.epochs,
        shuffle=data.shuffle,
        temperature=data.temperature,
        streaming=data.streaming,
        window=data.window,
        **shape,
        **copies,
    )
    held_out = None
    if data.eval:
        held_out = make(data.eval, tok, epochs=1, shuffle=False, **shape)
    elif data.validation is not None:
        held_out = _held_out(make, data, tok, shape | copies)
    facts = {"data.train": train.checksum, "held-out data": held_out and held_out.checksum}
    distributed.check_consistent("the data (by its checksum)", facts)
    return train, held_out


def _held_out(
    make: Callable[..., Batches[Any]], data: DataConfig, tok: Any, shape: dict[str, Any]
) -> Batches[Any]:
    """What `data.validation` keeps back from training."""
    # Weights and numbers of rows shape what is trained; what was held out is measured whole.
    whole = [
        source
        if isinstance(source, str)
        else dataclasses.replace(source, weight=None, rows=None, epochs=None)
        for source in data.train
    ]
    return make(whole, tok, split="validation", epochs=1, shuffle=False, **shape)


def names_of(batches: Batches[Any] | None) -> tuple[str, ...]:
    """The sources by which figures are also logged."""
    return () if batches is None else batches.sources


def total_of(config: Any, batches: Batches[Any]) -> int:
    """Batches that the run trains on in all: as many as there are, or `run.steps`."""
    if config.data.epochs is None or config.data.streaming:
        return config.run.steps
    return min(len(batches), config.run.steps or len(batches))
