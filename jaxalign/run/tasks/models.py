"""A run's models: checked against the tokenizer, with adapters, heads and shardings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.hf.load import expect_language_model, expect_reward_model
from jaxalign.hf.special_tokens import check_rows_for
from jaxalign.models.base import DecoderConfig, combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import (
    make_adapters,
    replaced,
    sharing_base,
    split_saved,
    without_adapters,
)
from jaxalign.models.scorer import Scorer, weigh_attributes, with_scalar_head
from jaxalign.parallel.rules import Rules, use_rules
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.run.config.base import ModelConfig, Run
from jaxalign.run.config.ppo import PPORun
from jaxalign.run.config.reward import RewardRun
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.shared_base import shares_base
from jaxalign.run.tasks.streams import Stream, stream_key
from jaxalign.types import Params


class Policy(NamedTuple):
    """A model to train with its parameters, on a mesh.

    Attributes:
      model: the model, with adapters if any.
      params: the trained parameters.
      frozen: the base under adapters, without its trained modules; `{}` without adapters.
    """

    model: Any
    params: Params
    frozen: Params

    def start(self) -> tuple[Decoder, Params]:
        """The initial model of the training: the base under adapters, else the model itself.

        Raises:
          ValueError: adapters that take a part of the base (PiSSA), because the rest is not the
            initial model.
        """
        lora = self.model.lora
        if lora is not None and lora.init == "pissa":
            raise ValueError(
                "model.lora.init=pissa: the base without adapters is not the model that training "
                "starts from, which the reference or the critic starts from here; name it: "
                "reference (critic) = the model of model.source, or take init=gaussian"
            )
        plain = dataclasses.replace(self.model, lora=None)
        if not self.frozen:
            return plain, self.params
        return plain, combine(without_adapters(self.params), self.frozen)


def load_trained(config: Run, mesh: Mesh, loader: Loader, tok: Any) -> Policy:
    """The model to train, language or reward model, with its adapters.

    Args:
      config: the run's config.
      mesh: the mesh for the model.
      loader: the loader of its arrays.
      tok: the tokenizer, whose ids the model must know; None: not checked.
    """
    source, lora = config.model.source, config.model.lora
    model, params = loader.load(source, config.model, mesh, remat=config.model.remat)
    check_vocabulary(tok, model, source)
    if lora is None:
        return Policy(model, params, {})
    if isinstance(model, Scorer):
        raise ValueError(
            f"model.lora with the reward model {source!r}: start from a language model"
        )
    base, key = model, stream_key(config.run.seed, Stream.ADAPTERS)
    adapters, changed = loader.make(
        lambda key, params: make_adapters(base, params, key, lora), key, params
    )
    model = dataclasses.replace(base, lora=lora)
    params = replaced(params, place(changed, base, mesh, loader))
    saved, frozen = split_saved(params, lora)
    return Policy(model, combine(place(adapters, model, mesh, loader), saved), frozen)


def load_policy(config: Run, mesh: Mesh, loader: Loader, tok: Any) -> Policy:
    """A language model to train; arguments as for `load_trained`."""
    policy = load_trained(config, mesh, loader, tok)
    expect_language_model(policy.model, config.model.source, "model.source")
    return policy


def load_trained_scorer(config: RewardRun, mesh: Mesh, loader: Loader, tok: Any) -> Policy:
    """A reward model to train, as loaded or with a new head; arguments as for `load_trained`."""
    loaded = load_trained(config, mesh, loader, tok)
    attributes, model = config.reward.attributes, loaded.model
    if isinstance(model, Scorer):
        if config.head == "pretrained":
            if model.attributes != attributes:
                raise ValueError(
                    f"reward.attributes={list(attributes)}: the head of the reward model "
                    f"{config.model.source!r} has {list(model.attributes)}; wanted the same, or "
                    "head=fresh to keep its body only"
                )
            return loaded
        model = model.base
    if "head" in loaded.params and loaded.frozen:
        raise ValueError(
            "model.lora: targets or modules_to_save name lm_head, which a reward model does not "
            "have; leave it out"
        )
    key = stream_key(config.run.seed, Stream.REWARD_HEAD)
    start = loaded.frozen if loaded.frozen else loaded.params
    scorer, full = with_fresh_head(model, start, key, attributes, mesh, loader)
    head = {"score": full.pop("score")}
    if loaded.frozen:
        return Policy(scorer, loaded.params | head, full)
    return Policy(scorer, full | head, {})


def with_fresh_head(
    model: Decoder, params: Params, key: jax.Array, attributes: tuple[str, ...], mesh: Mesh,
    loader: Loader,
) -> tuple[Scorer, Params]:  # fmt: skip
    """A scorer with a new head on a language model, see `with_scalar_head`."""
    scorer = Scorer(model, attributes)
    head = loader.make(
        lambda key: with_scalar_head(model, params, key, attributes)[1]["score"], key
    )
    trunk = {name: value for name, value in params.items() if name != "head"}
    return scorer, trunk | place({"score": head}, scorer, mesh, loader)


def load_frozen(
    source: str, option: str, config: ModelConfig, mesh: Mesh, loader: Loader
) -> tuple[Decoder, Params]:
    """A frozen language model; `option` names `source` in messages.

    It is in floats, unless it is the policy's own initial model.
    """
    if source != config.source:
        config = dataclasses.replace(config, quantize=None)
    model, params = loader.load(source, config, mesh, remat="none")
    return expect_language_model(model, source, option), params


def with_single_score(
    model: Scorer,
    params: Params,
    weights: Mapping[str, float] | None,
    source: str,
    mesh: Mesh,
    loader: Loader,
) -> tuple[Scorer, Params]:
    """A reward model with a single score: several attributes become their weighted sum."""
    if weights is not None:

        def weigh(head: Params) -> Params:
            return weigh_attributes(model, {"score": head}, weights)[1]["score"]

        head = loader.make(weigh, params["score"])
        single = dataclasses.replace(model, attributes=())
        return single, params | place({"score": head}, single, mesh, loader)
    if len(model.attributes) > 1:
        raise ValueError(
            f"{source!r} has the attributes {', '.join(model.attributes)} and no single score; say "
            "how much each counts: reward_weights (attributes, of one in a list of rewards): {"
            + f"{model.attributes[0]}: 1.0"
            + "}"
        )
    return model, params


class Scorers:
    """A PPO run's reward models and critic; each source is loaded once, whatever its uses.

    Args:
      config: the run's config.
      mesh: the run's mesh; a model with its own devices is placed on those.
      loader: the loader of their arrays.
      tok: the policy's tokenizer, or None.
      policy: the initial policy; a reward model may be an adapter on its base. None: no reward
        model is.
    """

    def __init__(
        self, config: PPORun, mesh: Mesh, loader: Loader, tok: Any, policy: Policy | None = None
    ):
        self._config, self._mesh, self._loader, self._tok = config, mesh, loader, tok
        self._policy = policy
        self._on_base: dict[str, tuple[Scorer, Params]] = {}
        self._loaded: dict[str, tuple[Scorer, Params]] = {}
        self._on_host: dict[int, tuple[Scorer, Params]] = {}

    def reward(self, spec: ModelReward) -> tuple[Scorer, Params]:
        """A reward model, on devices or in host memory as configured.

        A reward model on the policy's base stays on the devices, since the policy also reads the
        base.
        """
        with_policy_ids = spec.tokenizer == "policy"
        if self._policy is not None and shares_base(self._config, spec, self._loader):
            return self._adapter(self._policy, spec, with_policy_ids)
        scorer, params = self._load("reward", spec.source, spec.attributes, with_policy_ids)
        if not self._config.offload_frozen:
            return scorer, params
        if id(params) not in self._on_host:
            self._on_host[id(params)] = scorer, self._loader.to_host(params)
        return self._on_host[id(params)]

    def _adapter(
        self, policy: Policy, spec: ModelReward, with_policy_ids: bool
    ) -> tuple[Scorer, Params]:
        """A reward model of adapters and a head on the policy's base."""
        key = f"{spec.source} {spec.attributes}"
        if key not in self._on_base:
            adapted, trained, frozen = self._loader.load_adapter(
                spec.source, *policy.start(), policy.model.lora, tuple(spec.attributes or ())
            )
            model, params = expect_reward_model(adapted, spec.source), combine(trained, frozen)
            self._on_base[key] = with_single_score(
                model, params, spec.attributes, spec.source, self._mesh, self._loader
            )
        if with_policy_ids:
            check_vocabulary(self._tok, self._on_base[key][0], spec.source)
        return self._on_base[key]

    def critic(self) -> tuple[Scorer, Params]:
        """The initial critic."""
        source, weights = self._config.critic_start()
        return self._load("critic", source, weights, True)

    def _load(
        self, role: str, source: str, weights: Mapping[str, float] | None, with_policy_ids: bool
    ) -> tuple[Scorer, Params]:
        config, apart = self._config, self._config.mesh.apart.get(role)
        layout = config.mesh.rules_of.get(role, {})
        # A separate critic may have a single score although the reward model has several.
        own_critic = role == "critic" and config.critic is not None
        key = f"{source} {weights} {own_critic} {sorted(layout.items())} {apart}"
        if key not in self._loaded:
            mesh = self._mesh if apart is None else config.mesh.make(model=role)
            with config.mesh.use_rules(role):
                self._loaded[key] = self._scorer(source, weights, mesh, own_critic)
        if with_policy_ids:
            check_vocabulary(self._tok, self._loaded[key][0], source)
        return self._loaded[key]

    def _scorer(
        self, source: str, weights: Mapping[str, float] | None, mesh: Mesh, own_critic: bool
    ) -> tuple[Scorer, Params]:
        # The critic is trained, and may share its source with a reward model, so both are in
        # floats.
        options = dataclasses.replace(self._config.model, quantize=None)
        loaded, params = self._loader.load_scorer(source, options, mesh, tuple(weights or ()))
        model = expect_reward_model(loaded, source)
        if own_critic and not model.attributes:
            weights = None
        return with_single_score(model, params, weights, source, mesh, self._loader)


def load_critic(
    config: PPORun, policy: Policy, scorers: Scorers, mesh: Mesh, loader: Loader
) -> tuple[Scorer | None, Params | None]:
    """The initial critic of a run, without adapters: (model, parameters), or (None, None)."""
    options = config.ppo
    if not options.has_critic:
        return None, None
    if options.shared_critic or config.critic in ("policy", "adapter"):
        key = stream_key(config.run.seed, Stream.CRITIC_HEAD)
        critic, params = with_fresh_head(*policy.start(), key, (), mesh, loader)
        rules = config.mesh.rules_of.get("critic")
        params = reshard_by_rules(params, critic, mesh, rules, loader)
    else:
        critic, params = scorers.critic()
    if config.critic_head == "zero":
        with config.mesh.use_rules("critic"):
            head = loader.make(lambda head: jax.tree.map(jnp.zeros_like, head), params["score"])
            params = params | place({"score": head}, critic, mesh, loader)
    return critic, {"score": params["score"]} if options.shared_critic else params


def with_adapters(
    config: PPORun, critic: Scorer, params: Params, mesh: Mesh, loader: Loader
) -> tuple[Scorer, Params, Params]:
    """A critic of adapters and a head on the policy's base: (model, trained, frozen).

    Args:
      config: of the run, with `critic: adapter`.
      critic: as `load_critic` loads it.
      params: its parameters; the base's arrays are the policy's own.
      mesh: the run's mesh.
      loader: of its models.
    """
    lora = config.model.lora
    assert lora is not None
    base, lora = critic.base, sharing_base(lora)
    key = jax.random.fold_in(stream_key(config.run.seed, Stream.ADAPTERS), 1)
    trunk = {name: value for name, value in params.items() if name != "score"}
    made, _ = loader.make(lambda key, trunk: make_adapters(base, trunk, key, lora), key, trunk)
    made = {name: value for name, value in made.items() if name != "head"}
    adapted = dataclasses.replace(critic, base=dataclasses.replace(base, lora=lora))
    adapters = place(made, adapted, mesh, loader)
    return adapted, adapters | {"score": params["score"]}, trunk


def check_vocabulary(tok: Any, model: Decoder | Scorer, source: str) -> None:
    """Raises ValueError for another model's tokenizer; see `hf.special_tokens.check_rows_for`."""
    if tok is not None:
        check_rows_for(tok, model.config.vocab_size, f"the model {source!r} has")


def check_same_shape(reference: Decoder, policy: Decoder, source: str, start: str) -> None:
    """Raises ValueError for a reference that cannot run with the policy's weights."""
    if _shape_of(reference) != _shape_of(policy):
        raise ValueError(
            f"reference={source!r} has another shape than the policy {start!r}; wanted the model "
            "that the policy started from"
        )


def _shape_of(model: Decoder) -> DecoderConfig:
    return dataclasses.replace(model.config, source_config="")


def place(tree: Params, model: Decoder | Scorer, mesh: Mesh, loader: Loader) -> Params:
    """Shards part of a model's parameters by the logical axes of the whole tree."""

    def part(tree: Any, whole: Any) -> Any:
        if not isinstance(tree, dict):
            return whole
        return {name: part(value, whole[name]) for name, value in tree.items()}

    shardings = param_shardings(part(tree, model.axes), mesh, tree)
    return loader.place(tree, shardings)


def reshard_by_rules(
    params: Params, model: Decoder | Scorer, mesh: Mesh, over: Rules | None, loader: Loader
) -> Params:
    """Reshards parameters by other rules; returns them unchanged for None or no rules."""
    if not over:
        return params
    with use_rules(over):
        return place(params, model, mesh, loader)


def pad_id(tok: Any) -> int:
    """The id that pads rows; masks exclude it everywhere, so any id works."""
    return 0 if tok.pad_token_id is None else int(tok.pad_token_id)
