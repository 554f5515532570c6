"""The reference of a run; there are three kinds.

- In memory: separate frozen parameters, or the base under adapters.
- Moving (TR-DPO): part of the optimizer's state, see `jaxalign.algorithms.moving_reference`.
- Cached: log-probabilities of all data computed beforehand, see `reference_cache`; no parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxalign.algorithms import dpo
from jaxalign.algorithms.moving_reference import ReferenceSync, reference_of, with_moving_reference
from jaxalign.data import resolve_chat_template
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lower_states import same_lower_layers
from jaxalign.run.config.dpo import DPORun
from jaxalign.run.config.ppo import PPORun
from jaxalign.run.config.reference import ReferenceRun
from jaxalign.run.digests import text_digest, tokenizer_digest, weights_digest
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.models import Policy, check_vocabulary, load_frozen, reshard_by_rules
from jaxalign.run.tasks.reference_cache import REMEDY, ReferenceCache
from jaxalign.types import Params, TrainState

AnyRun = ReferenceRun | PPORun
"""Runs that have a reference."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference in memory, or one that moves.

    Attributes:
      model: the model of its parameters.
      held: its parameters; None: it moves, and is part of the optimizer's state.
    """

    model: Decoder
    held: Params | None

    def params(self, state: TrainState) -> Params:
        """Its parameters at this moment of the run."""
        if self.held is not None:
            return self.held
        return combine(reference_of(state), state.frozen)

    def shares_layers(self, policy: Decoder, state: TrainState) -> bool:
        """Whether its lower layers are those of PPO's policy, see `same_lower_layers`."""
        own = combine(state.params, state.frozen)["policy"]
        return same_lower_layers(policy, own, self.model, self.params(state))


def reference_optimizer(
    tx: optax.GradientTransformation, sync: ReferenceSync | None
) -> optax.GradientTransformation:
    """The optimizer, with the reference in its state if the reference moves."""
    return tx if sync is None else with_moving_reference(tx, sync)


def reference_in_memory(
    config: AnyRun, policy: Policy, mesh: Mesh, loader: Loader, tok: Any
) -> Reference:
    """The frozen reference: the configured model, or the initial model of the training.

    Args:
      config: the run's config.
      policy: the initial policy; without `reference` its weights are shared, not copied.
      mesh: the run's mesh.
      loader: the loader of arrays.
      tok: the policy's tokenizer, or None.
    """
    rules = config.mesh.rules_of.get("reference")
    elsewhere = "reference" in config.mesh.apart
    if config.reference is None and not elsewhere:
        model, params = policy.start()
        params = reshard_by_rules(params, model, mesh, rules, loader)
        # The policy also reads the base under its adapters, so the base stays on the device.
        movable = bool(rules) or not policy.frozen
    else:
        model, params = _named(config, mesh, loader, tok)
        movable = True
    return Reference(model, loader.to_host(params) if config.offload_frozen and movable else params)


def moving_reference(
    config: ReferenceRun, policy: Policy, state: TrainState, mesh: Mesh, loader: Loader, tok: Any
) -> tuple[TrainState, Reference]:
    """The reference in the state of `reference_optimizer`'s optimizer, and that state.

    It starts as the initial policy, or as the configured model.
    """
    if config.reference is None:
        return state, Reference(policy.model, None)
    model, params = _named(config, mesh, loader, tok)
    return loader.start_reference(state, params), Reference(model, None)


def make_reference(
    config: ReferenceRun, policy: Policy, state: TrainState, mesh: Mesh, loader: Loader, tok: Any
) -> tuple[TrainState, Reference]:
    """The reference of a preference run, and the train state, which holds a moving reference."""
    if config.reference_sync is not None:
        return moving_reference(config, policy, state, mesh, loader, tok)
    return state, reference_in_memory(config, policy, mesh, loader, tok)


def _named(config: AnyRun, mesh: Mesh, loader: Loader, tok: Any) -> tuple[Decoder, Params]:
    """The reference from its own source, on its own devices and with its own layout."""
    source = config.model.source if config.reference is None else config.reference
    with config.mesh.use_rules("reference"):
        if "reference" in config.mesh.apart:
            mesh = config.mesh.make(model="reference")
        model, params = load_frozen(source, "reference", config.model, mesh, loader)
    check_vocabulary(tok, model, source)
    return model, params


def cached_reference(
    config: DPORun, policy: Policy, batches: Callable[[], Iterable[Any]], mesh: Mesh,
    loader: Loader, tok: Any,
) -> ReferenceCache:  # fmt: skip
    """The reference's log-probabilities of all pairs: read from the folder, or computed and saved.

    Args:
      config: the run's config, with `reference_cache`.
      policy: the initial policy.
      batches: returns all batches of the run, including held-out ones.
      mesh: the run's mesh.
      loader: the loader of the reference, which is loaded only if there is no cache.
      tok: the policy's tokenizer.

    Raises:
      ValueError: the cache belongs to something else, or lacks some of the run's pairs.
    """
    folder = config.reference_cache
    if folder is None or jax.process_count() > 1:
        raise ValueError(
            f"reference_cache={folder!r} with {jax.process_count()} processes: wanted a folder and "
            "one process"
        )
    fingerprint = _fingerprint(config, policy, tok)
    cache = ReferenceCache.load(folder, fingerprint)
    if cache is not None:
        missing = cache.missing(batches())
        if missing:
            raise ValueError(
                f"reference cache {folder} belongs to other data: {missing} of the run's pairs are "
                f"not among its {len(cache)}; {REMEDY}"
            )
        return cache
    cache = ReferenceCache()
    reference = reference_in_memory(config, policy, mesh, loader, tok)
    prepare = dpo.make_prepare(reference.model, config.dpo)
    cache.add(batches(), lambda batch: prepare(reference.held, batch))
    cache.save(folder, fingerprint)
    print(f"reference cache {folder}: log-probabilities of {len(cache)} pairs written")
    return cache


def _fingerprint(config: DPORun, policy: Policy, tok: Any) -> dict[str, Any]:
    """Everything that determines the log-probabilities of a pair."""
    template = resolve_chat_template(tok, config.model.chat_template)
    source = config.model.source if config.reference is None else config.reference
    return {
        "model": weights_digest(source),
        "tokenizer": tokenizer_digest(tok),
        "chat_template": text_digest(str(template)),
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "compute_dtype": str(policy.model.compute_dtype),
        "ld_alpha": config.dpo.ld_alpha,
    }
