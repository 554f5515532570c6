"""The models around PPO's policy: its reference and its critic."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer, with_scalar_head
from jaxalign.parallel.sharding import reshard_by_rules
from jaxalign.run.config.runs import PPORun
from jaxalign.run.tasks.models import Loaded, Scorers, language_model, shape_of
from jaxalign.types import Params


def start_reference(config: PPORun, loaded: Loaded, mesh: Mesh) -> tuple[Decoder, Params]:
    """The frozen reference: the model named, or the start; under adapters that is the base."""
    model, params = _start(loaded)
    away = "reference" in config.mesh.apart
    if config.reference is None and not away:
        return model, reshard_by_rules(params, model.axes, config.mesh.rules_of.get("reference"))
    source = config.model.source if config.reference is None else config.reference
    with config.mesh.use_rules("reference"):
        if away:
            mesh = config.mesh.make(model="reference")
        reference, params = language_model(source, config.model, mesh)
    if shape_of(reference) != shape_of(model):
        raise ValueError(
            f"reference={source!r} has another shape than the policy "
            f"{config.model.source!r}; wanted the model that the policy started from"
        )
    return reference, params


def start_critic(
    config: PPORun, loaded: Loaded, scorers: Scorers
) -> tuple[Scorer | None, Params | None]:
    """The critic that the run begins with; neither model nor parameters where there is none."""
    options = config.ppo
    if not options.has_critic:
        return None, None
    if options.shared_critic or config.critic == "policy":
        key = jax.random.fold_in(jax.random.key(config.run.seed), 2**31 - 4)
        critic, params = with_scalar_head(*_start(loaded), key)
        params = reshard_by_rules(params, critic.axes, config.mesh.rules_of.get("critic"))
    else:
        critic, params = scorers.critic()
    if config.critic_head == "zero":
        params = params | {"score": jax.tree.map(jnp.zeros_like, params["score"])}
    return critic, {"score": params["score"]} if options.shared_critic else params


def _start(loaded: Loaded) -> tuple[Decoder, Params]:
    plain = dataclasses.replace(loaded.model, lora=None)
    return plain, loaded.frozen if loaded.frozen else loaded.params
