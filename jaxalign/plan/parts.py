"""A run as shapes: models, optimizer state and batches, laid out on a mesh but never made."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.algorithms import dpo, kto, ppo, reward, sft
from jaxalign.algorithms.moving_reference import with_moving_reference
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.step import Step
from jaxalign.hf import families
from jaxalign.hf.gguf_file import GGUFFile
from jaxalign.hf.source import locate, read_json
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.host_memory import HOST
from jaxalign.parallel.rules import Rules, use_rules
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.types import (
    GradedBatch,
    PairBatch,
    Params,
    RankedBatch,
    RolloutBatch,
    StepBatch,
    TokenBatch,
    UnpairedBatch,
)

RANKED_ANSWERS = 4
"""Answers of a prompt that a plan assumes where the config does not say."""


class Parts(NamedTuple):
    """What a step is compiled from.

    Attributes:
      params: trained parameters.
      frozen: the base under adapters, or `{}`.
      tx: optimizer.
      step: as the algorithm's `make_step` gives it.
      batch: what the step takes.
      models: parameters that a run holds beside the step, for `prepare`.
      roles: "policy", "critic", "reference", "reward" → (model, its parameters), of those that take
        part; the reference under adapters is the base.
      notes: what was assumed, one sentence each.
    """

    params: Params
    frozen: Params
    tx: Any
    step: Step
    batch: Any
    models: list[Params]
    roles: dict[str, tuple[Any, Params]]
    notes: tuple[str, ...] = ()


class HostArray(jax.ShapeDtypeStruct):
    """An array that is not there, in the host's memory.

    Its sharding says so too where the compiler knows of such memory. Ahead of time those of GPUs do
    not: a program that reads such an array is then counted as having all of it on the device.
    """


def array(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _sft(config: Any, mesh: Mesh) -> Parts:
    model, params, frozen = _policy(config, mesh)
    tx = _optimizer(config.optimizer)
    step = sft.make_step(model, tx, config.sft, micro_batches=config.run.micro_batches)
    batch = _tokens(config.data.rows, config.data.length)
    return Parts(params, frozen, tx, step, batch, [], {"policy": (model, params)})


def _reward(config: Any, mesh: Mesh) -> Parts:
    model = _read(config.model.source, config.model, mesh)
    lora = config.model.lora
    attributes = config.reward.attributes
    fresh = isinstance(model, Decoder) or config.head == "fresh"
    if isinstance(model, Scorer) and config.head == "pretrained" and model.attributes != attributes:
        raise ValueError(
            f"reward.attributes={list(attributes)}: the head of {config.model.source!r} has "
            f"{list(model.attributes)}; wanted the same, or head=fresh"
        )
    if isinstance(model, Decoder):
        model = Scorer(dataclasses.replace(model, lora=lora), attributes)
    elif lora is not None:
        raise ValueError(
            f"model.lora with the reward model {config.model.source!r}: start from a language model"
        )
    model = dataclasses.replace(model, attributes=attributes)
    params, frozen = _params(model, mesh, config.model.dtype, fresh_head=fresh)
    tx = _optimizer(config.optimizer)
    step = reward.make_step(model, tx, config.reward, micro_batches=config.run.micro_batches)
    return Parts(params, frozen, tx, step, _judged(config), [], {"policy": (model, params)})


def _dpo(config: Any, mesh: Mesh) -> Parts:
    model, params, frozen = _policy(config, mesh)
    tx = _preference_optimizer(config)
    step = dpo.make_step(model, tx, config.dpo, micro_batches=config.run.micro_batches)
    batch, models, roles = _pairs(config), [], {"policy": (model, params)}
    if config.dpo.has_reference:
        pairs = (config.data.rows,) if batch.mask is None else batch.mask.shape
        logps = array(pairs, jnp.float32)
        batch = batch._replace(ref_chosen_logps=logps, ref_rejected_logps=logps)
        if config.reference_cache is None:
            models, roles["reference"] = _reference(config, mesh, model, params, frozen)
    return Parts(params, frozen, tx, step, batch, models, roles)


def _kto(config: Any, mesh: Mesh) -> Parts:
    model, params, frozen = _policy(config, mesh)
    tx = _preference_optimizer(config)
    step = kto.make_step(model, tx, config.kto, micro_batches=config.run.micro_batches)
    tokens = _tokens(config.data.rows, config.data.length)
    per_row = array((config.data.rows,), jnp.float32)
    desirable = array((config.data.rows,), jnp.bool_)
    batch = UnpairedBatch(tokens, desirable, tokens, per_row, per_row)
    models, reference = _reference(config, mesh, model, params, frozen)
    roles = {"policy": (model, params), "reference": reference}
    return Parts(params, frozen, tx, step, batch, models, roles)


def _preference_optimizer(config: Any) -> Any:
    tx = _optimizer(config.optimizer)
    return tx if config.reference_sync is None else with_moving_reference(tx, config.reference_sync)


def _reference(
    config: Any, mesh: Mesh, model: Decoder, params: Params, frozen: Params
) -> tuple[list[Params], tuple[Decoder, Params]]:
    """What a run holds for its reference beside the step, and the reference itself."""
    if config.reference is None:
        # Adapters leave it untouched; a reference that moves is part of the optimizer's state.
        if config.reference_sync is not None and frozen:
            return [], (model, combine(params, frozen))
        plain = dataclasses.replace(model, lora=None)
        if "reference" in config.mesh.rules_of:  # a copy of its own
            own = relaid_shapes(plain, frozen or params, mesh, config.mesh.rules_of["reference"])
        elif frozen or config.reference_sync is not None:
            return [], (plain, frozen or params)
        else:
            own = params
        own = _away(own) if config.offload_frozen else own
        return [own], (plain, own)
    reference = _read(config.reference, config.model, mesh)
    if not isinstance(reference, Decoder):
        raise ValueError(
            f"reference={config.reference!r} is a reward model; wanted a language model"
        )
    with config.mesh.use_rules("reference"):
        loaded = _params(reference, mesh, config.model.dtype)[0]
    loaded = _away(loaded) if config.offload_frozen else loaded
    # One that moves is copied into the optimizer's state; what was loaded goes.
    return [loaded] if config.reference_sync is None else [], (reference, loaded)


def _ppo(config: Any, mesh: Mesh) -> Parts:
    if config.data.packing:
        raise ValueError("data.packing=true: prompts for rollouts are not packed; leave it out")
    options, notes = config.ppo, []
    model, policy, base = _policy(config, mesh)
    with config.mesh.use_rules("reward"):
        scorers = [
            _scorer(spec.source, spec.attributes, config, mesh, notes)
            for spec in config.reward_specs()
            if isinstance(spec, ModelReward)
        ]
    start = dataclasses.replace(model, lora=None)
    frozen_start = base if base else policy
    rules = config.mesh.rules_of.get("reference")
    reference = (start, relaid_shapes(start, frozen_start, mesh, rules))
    # Adapters leave their base untouched: unless it is to lie otherwise, it is there already.
    shared = bool(base) and not rules
    if config.offload_frozen:
        scorers = [(scorer, _away(weights)) for scorer, weights in scorers]
        reference = reference if shared else (start, _away(reference[1]))
    roles = {"policy": (model, policy), "reference": reference}
    roles |= {f"reward{number or ''}": pair for number, pair in enumerate(scorers)}
    critic = critic_params = critic_tx = None
    if options.has_critic:
        with config.mesh.use_rules("critic"):
            critic, critic_params = roles["critic"] = _critic(config, model, mesh, notes)
        critic_tx = _optimizer(config.critic_optimizer or config.optimizer)
    warmup = config.critic_warmup * config.ppo_epochs * config.minibatches
    tx = ppo.make_optimizer(_optimizer(config.optimizer), critic_tx, critic_warmup=warmup)
    step = ppo.make_step(model, critic, tx, options, micro_batches=config.run.micro_batches)
    params = ppo.init_params(policy, critic_params)
    held = [*([] if shared else [reference[1]]), *(scorer_params for _, scorer_params in scorers)]
    batch = rollout(config, config.data.rows * options.samples // config.minibatches)
    if config.ptx is not None:
        batch = batch._replace(ptx=_tokens(config.ptx.rows, config.ptx.length))
    frozen = {"policy": base} if base else {}
    return Parts(params, frozen, tx, step, batch, held, roles, tuple(dict.fromkeys(notes)))


def rollout(config: Any, rows: int) -> RolloutBatch:
    """So many rows of a rollout, an answer a row."""
    options = config.ppo
    tokens = _tokens(rows, config.data.length + options.max_new_tokens - 1)
    per_token = array(tokens.inputs.shape, jnp.float32)
    flags, numbers = array((rows,), jnp.bool_), array((rows,), jnp.float32)
    of_critic = per_token if options.has_critic else None
    filters = options.mask_truncated or options.skip_equal_groups
    scaled = options.normalize_scores or options.reward_clip is not None
    return RolloutBatch(
        tokens,
        old_logprobs=per_token,
        ref_logprobs=per_token,
        old_values=of_critic,
        advantages=per_token,
        returns=of_critic,
        value_mask=tokens.loss_mask,
        rewards=per_token,
        scores=numbers,
        sampler_logprobs=per_token,
        finished=flags,
        valid=flags,
        answer_mask=tokens.loss_mask if filters else None,
        scaled_scores=numbers if scaled else None,
        temperature=numbers,
        kl_coef=numbers if options.kl_in == "loss" else None,
    )


def _critic(config: Any, policy: Decoder, mesh: Mesh, notes: list[str]) -> tuple[Scorer, Params]:
    """The critic of a PPO run, which may be a head on the policy alone."""
    if not config.ppo.shared_critic and config.critic != "policy":
        source, weights = config.critic_start()
        return _scorer(source, weights, config, mesh, notes)
    critic = Scorer(dataclasses.replace(policy, lora=None))
    params, _ = _params(critic, mesh, config.model.dtype, fresh_head=True)
    return critic, {"score": params["score"]} if config.ppo.shared_critic else params


PARTS: dict[str, Callable[[Any, Mesh], Parts]] = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "kto": _kto,
    "ppo": _ppo,
}
"""Algorithm → (configuration, mesh) → its parts."""


def _read(source: str, config: Any, mesh: Mesh) -> Decoder | Scorer:
    """A model by its shape alone: from the package, else from its `config.json` or GGUF file."""
    hf, path = known_shape(source), source
    if hf is None:
        path = locate(source, ("config.json",))
        if path.is_dir():
            hf = read_json(path / "config.json")
        else:
            with contextlib.closing(GGUFFile(path)) as file:
                hf = file.config
    try:
        shape, scorer = families.config_from_hf(hf), families.is_scorer(hf)
        attributes = families.attributes_of(hf) if scorer else ()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    compute = config.compute_dtype
    if compute is None:
        compute = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    model = Decoder(shape, compute_dtype=compute, remat=config.remat, attention=config.attention)
    return Scorer(model, attributes) if scorer else model


def known_shape(source: str) -> dict[str, Any] | None:
    """`config.json` of a hub id that the package knows, so that planning needs no hub."""
    return None if pathlib.Path(source).exists() else _shapes().get(source)


@functools.lru_cache
def _shapes() -> dict[str, dict[str, Any]]:
    found = {}
    for file in (importlib.resources.files("jaxalign.plan") / "shapes").iterdir():
        shape = json.loads(file.read_text(encoding="utf-8"))
        found |= dict.fromkeys(shape.pop("_names"), shape)
    return found


def _policy(config: Any, mesh: Mesh) -> tuple[Decoder, Params, Params]:
    model = _read(config.model.source, config.model, mesh)
    if not isinstance(model, Decoder):
        raise ValueError(
            f"model.source={config.model.source!r} is a reward model; wanted a language model"
        )
    model = dataclasses.replace(model, lora=config.model.lora)
    return model, *_params(model, mesh, config.model.dtype)


def _scorer(
    source: str, weights: dict[str, float] | None, config: Any, mesh: Mesh, notes: list[str]
) -> tuple[Scorer, Params]:
    if known_shape(config.model.source) is not None and not pathlib.Path(source).exists():
        # The policy's weights are not here either: nothing of this run is.
        notes.append(f"reward model {source!r} is not there: taken to be shaped like the policy")
        model = _read(config.model.source, config.model, mesh)
        model = model if isinstance(model, Scorer) else Scorer(model)
    else:
        model = _read(source, config.model, mesh)
    if not isinstance(model, Scorer):
        raise ValueError(f"{source!r} is a language model without a score; wanted a reward model")
    if len(model.attributes) > 1 and weights is None:
        raise ValueError(
            f"{source!r} has the attributes {', '.join(model.attributes)} and no single score; say "
            "how much each counts by reward_weights, or attributes in a list of rewards"
        )
    model = dataclasses.replace(model, attributes=())  # the weighted sum, if there are several
    return model, _params(model, mesh, config.model.dtype)[0]


def _params(
    model: Decoder | Scorer, mesh: Mesh, dtype: str, *, fresh_head: bool = False
) -> tuple[Params, Params]:
    """Abstract parameters, trained and frozen; what a run makes itself is float32."""
    adapted = (model.base if isinstance(model, Scorer) else model).lora is not None
    shardings = families.flatten(param_shardings(model.axes, mesh, model.shapes))
    trained, frozen = {}, {}
    for path, shape in families.flatten(model.shapes).items():
        made = "lora_" in path or (fresh_head and path.startswith("score/"))
        part = trained if made or not adapted else frozen
        kind = jnp.float32 if made else jnp.dtype(dtype)
        part[path] = array(shape.shape, kind, shardings[path])
    return families.unflatten(trained), families.unflatten(frozen)


def _away(params: Params) -> Params:
    """The same in the host's memory."""
    return jax.tree.map(
        lambda x: HostArray(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST)), params
    )


def relaid_shapes(model: Decoder, params: Params, mesh: Mesh, over: Rules | None) -> Params:
    """What `sharding.relaid` gives, of arrays that are not there."""
    if not over:
        return params
    with use_rules(over):
        layout = param_shardings(model.axes, mesh, model.shapes)
    return jax.tree.map(lambda x, sharding: array(x.shape, x.dtype, sharding), params, layout)


def _optimizer(config: OptimizerConfig) -> Any:
    """As a run makes it; how long the schedule is changes no shape."""
    if config.total_steps is None:
        config = dataclasses.replace(config, total_steps=config.warmup_steps + 1)
    return make_optimizer(config)


def _tokens(rows: int, length: int) -> TokenBatch:
    ids = array((rows, length), jnp.int32)
    mask = array((rows, length), jnp.bool_)
    return TokenBatch(ids, ids, ids, ids, mask)


def _judged(config: Any) -> Any:
    """A batch of the objective; how many answers a prompt has is known from data only."""
    rows, length = config.data.rows, config.data.length
    options = config.reward
    if options.objective == "ranking":
        each = (rows, RANKED_ANSWERS if config.answers is None else config.answers)
        answers = jax.tree.map(lambda x: array((*each, length), x.dtype), _tokens(rows, length))
        return RankedBatch(answers, array(each, jnp.float32), array(each, jnp.bool_))
    if options.objective == "regression":
        each = (rows, len(options.attributes))
        return GradedBatch(_tokens(rows, length), array(each, jnp.float32), array(each, jnp.bool_))
    if options.objective == "steps":
        tokens = _tokens(rows, length)
        labels = array((rows, length), jnp.float32)
        return StepBatch(tokens, labels, tokens.loss_mask)
    return _pairs(config)


def _pairs(config: Any) -> PairBatch:
    """Pairs; how many a packed row holds is known from data only, one is assumed."""
    side = _tokens(config.data.rows, config.data.length)
    mask = array((config.data.rows, 1), jnp.bool_) if config.data.packing else None
    return PairBatch(side, side, mask=mask)
