"""The reference of a preference run: held beside the policy, following it, or asked beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import optax

from jaxalign.algorithms import dpo
from jaxalign.algorithms.moving_reference import (
    ReferenceSync,
    reference_of,
    start_reference,
    with_moving_reference,
)
from jaxalign.data import resolve_chat_template
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.host_memory import to_host_memory
from jaxalign.parallel.sharding import reshard_by_rules
from jaxalign.run.config.runs import DPORun, KTORun
from jaxalign.run.tasks.reference_cache import (
    REMEDY,
    ReferenceCache,
    text_digest,
    tokenizer_digest,
    weights_digest,
)
from jaxalign.types import Params, TrainState

Load = Callable[[str], tuple[Decoder, Params]]
"""Loads the model that `reference` names."""


class Reference(NamedTuple):
    """A reference that is asked for every batch.

    Attributes:
      model: its model.
      params: state → its parameters at that moment of the run.
    """

    model: Decoder
    params: Callable[[TrainState], Params]


def reference_optimizer(
    tx: optax.GradientTransformation, sync: ReferenceSync | None
) -> optax.GradientTransformation:
    """The optimizer, with a reference in its state where that is to follow the policy."""
    return tx if sync is None else with_moving_reference(tx, sync)


def hold_reference(
    config: DPORun | KTORun, loaded: Any, state: TrainState, load: Load
) -> tuple[TrainState, Reference]:
    """The reference of a run, and the state to start from, which holds it if it is to move."""
    if config.reference is not None:
        with config.mesh.use_rules("reference"):
            model, params = load(config.reference)
        if config.reference_sync is not None:
            return start_reference(state, params), Reference(model, reference_of)
        return state, _held(config, model, params)
    if config.reference_sync is not None:
        return state, Reference(
            loaded.model, lambda state: combine(reference_of(state), state.frozen)
        )
    return state, _held(config, *_start(config, loaded))


def keep_reference(
    config: DPORun, loaded: Any, pairs: Callable[[], Iterable[Any]], load: Load
) -> ReferenceCache:
    """What the reference says of all pairs of a run: read from its folder, or computed and kept.

    Args:
      config: of the run, with `reference_cache`.
      loaded: the policy as it starts.
      pairs: gives all batches of the run, held-out ones too.
      load: called only where there is no cache.

    Raises:
      ValueError: the cache belongs to something else, or lacks some of the run's pairs.
    """
    folder = config.reference_cache
    if folder is None or jax.process_count() > 1:
        raise ValueError(
            f"reference_cache={folder!r} with {jax.process_count()} processes: wanted a folder and "
            "one process"
        )
    template = resolve_chat_template(loaded.tok, config.model.chat_template)
    fingerprint = {
        "model": weights_digest(
            config.model.source if config.reference is None else config.reference
        ),
        "tokenizer": tokenizer_digest(loaded.tok),
        "chat_template": text_digest(str(template)),
        "dtype": config.model.dtype,
        "compute_dtype": str(loaded.model.compute_dtype),
        "ld_alpha": config.dpo.ld_alpha,
    }
    cache = ReferenceCache.load(folder, fingerprint)
    if cache is not None:
        missing = cache.missing(pairs())
        if missing:
            raise ValueError(
                f"reference cache {folder} belongs to other data: {missing} of the run's pairs are "
                f"not among its {len(cache)}; {REMEDY}"
            )
        return cache
    cache = ReferenceCache()
    if config.reference is None:
        model, params = _start(config, loaded)
    else:
        with config.mesh.use_rules("reference"):
            model, params = load(config.reference)
    prepare = dpo.make_prepare(model, config.dpo)
    cache.add(pairs(), lambda batch: prepare(params, batch))
    cache.save(folder, fingerprint)
    print(f"reference cache {folder}: log-probabilities of {len(cache)} pairs written")
    return cache


def _held(config: DPORun | KTORun, model: Decoder, params: Params) -> Reference:
    params = to_host_memory(params) if config.offload_frozen else params
    return Reference(model, lambda state: params)


def _start(config: DPORun | KTORun, loaded: Any) -> tuple[Decoder, Params]:
    """The starting model as a reference. Under LoRA that is the base; else `init_state` copies."""
    adapted = config.model.lora is not None
    model = dataclasses.replace(loaded.model, lora=None)
    params = loaded.frozen if adapted else loaded.params
    return model, reshard_by_rules(params, model.axes, config.mesh.rules_of.get("reference"))
