"""Models as a run wants them: checked against the tokenizer, with adapters and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.hf import load_pretrained
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import add_lora
from jaxalign.models.scorer import Scorer, weigh_attributes, with_scalar_head
from jaxalign.parallel.host_memory import to_host_memory
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.run.config.runs import ModelConfig, PPORun, RewardRun
from jaxalign.run.export import run_tokenizer
from jaxalign.types import Params


class Loaded(NamedTuple):
    """A model with its tokenizer and split parameters, on a mesh."""

    model: Any
    params: Params
    frozen: Params
    tok: Any


def load(config: ModelConfig, mesh: Mesh, seed: int) -> Loaded:
    """The model to train, whatever it is, with its adapters."""
    tok = run_tokenizer(config)
    model, params = load_pretrained(
        config.source,
        mesh=mesh,
        dtype=config.dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
    )
    check_vocabulary(tok, model, config.source)
    if config.lora is None:
        return Loaded(model, params, {}, tok)
    if isinstance(model, Scorer):
        raise ValueError(
            f"model.lora with the reward model {config.source!r}: start from a language model"
        )
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 2)
    model, adapters, base = add_lora(model, params, key, config.lora)
    return Loaded(model, place(adapters, model.axes, mesh), base, tok)


def load_policy(config: ModelConfig, mesh: Mesh, seed: int) -> Loaded:
    """A language model to train."""
    loaded = load(config, mesh, seed)
    if not isinstance(loaded.model, Decoder):
        raise ValueError(
            f"model.source={config.source!r} is a reward model; wanted a language model"
        )
    return loaded


def with_head(loaded: Loaded, mesh: Mesh, config: RewardRun) -> Loaded:
    """A reward model to train: as loaded, or with a fresh head of as many outputs as are wanted."""
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
    key = jax.random.fold_in(jax.random.key(config.run.seed), 2**31 - 3)
    scorer, full = with_scalar_head(model, loaded.frozen or loaded.params, key, attributes)
    head = place({"score": full.pop("score")}, scorer.axes, mesh)
    if loaded.frozen:
        return loaded._replace(model=scorer, params=loaded.params | head, frozen=full)
    return loaded._replace(model=scorer, params=full | head)


def language_model(source: str, config: ModelConfig, mesh: Mesh) -> tuple[Decoder, Params]:
    """A frozen language model, held as the one that is trained."""
    model, params = load_pretrained(
        source,
        mesh=mesh,
        dtype=config.dtype,
        compute_dtype=config.compute_dtype,
        attention=config.attention,
    )
    if not isinstance(model, Decoder):
        raise ValueError(f"reference={source!r} is a reward model; wanted a language model")
    return model, params


def reference_model(
    source: str, *, loaded: Loaded, config: ModelConfig, mesh: Mesh
) -> tuple[Decoder, Params]:
    """A frozen language model that reads the same tokens as the one that is trained."""
    model, params = language_model(source, config, mesh)
    check_vocabulary(loaded.tok, model, source)
    return model, params


def load_scorer(
    source: str,
    weights: Mapping[str, float] | None,
    config: ModelConfig,
    mesh: Mesh,
    *,
    critic: bool = False,
) -> tuple[Scorer, Params]:
    """A reward model with one score: of several attributes, their weighted sum."""
    model, params = load_pretrained(
        source,
        mesh=mesh,
        dtype=config.dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
    )
    if not isinstance(model, Scorer):
        raise ValueError(
            f"{source!r} is a language model without a score; wanted a reward model, "
            "as `jaxalign reward` makes"
        )
    # A critic of its own may have one score where the reward model has several.
    if weights is not None and not (critic and not model.attributes):
        return weigh_attributes(model, params, weights)
    if len(model.attributes) > 1:
        raise ValueError(
            f"{source!r} has the attributes {', '.join(model.attributes)} and no single score; say "
            "how much each counts: reward_weights (attributes, of one in a list of rewards): {"
            + f"{model.attributes[0]}: 1.0"
            + "}"
        )
    return model, params


class Scorers:
    """The models with a score of a PPO run, each loaded once, whatever it is for."""

    def __init__(self, config: PPORun, mesh: Mesh, tok: Any):
        self._config, self._mesh, self._tok = config, mesh, tok
        self._loaded: dict[str, tuple[Scorer, Params]] = {}

    def reward(self, spec: ModelReward) -> tuple[Scorer, Params]:
        """One that scores answers."""
        reads = spec.tokenizer == "policy"
        return self._load("reward", spec.source, spec.attributes, reads_ids=reads)

    def held(self, spec: ModelReward) -> tuple[Scorer, Params]:
        """The same in the host's memory."""
        scorer, params = self.reward(spec)
        return scorer, to_host_memory(params)

    def critic(self) -> tuple[Scorer, Params]:
        """What the critic starts from."""
        start, named = self._config.critic_start(), self._config.critic is not None
        return self._load("critic", *start, critic=named)

    def _load(
        self,
        role: str,
        source: str,
        weights: Mapping[str, float] | None,
        *,
        critic: bool = False,
        reads_ids: bool = True,
    ) -> tuple[Scorer, Params]:
        layout = self._config.mesh.rules_of.get(role, {})
        apart = self._config.mesh.apart.get(role)
        key = f"{source} {weights} {critic} {sorted(layout.items())} {apart}"
        if key not in self._loaded:
            mesh = self._mesh if apart is None else self._config.mesh.make(model=role)
            with self._config.mesh.use_rules(role):
                self._loaded[key] = load_scorer(
                    source, weights, self._config.model, mesh, critic=critic
                )
        if reads_ids:
            check_vocabulary(self._tok, self._loaded[key][0], source)
        return self._loaded[key]


def check_vocabulary(tok: Any, model: Decoder | Scorer, source: str) -> None:
    """Refuses ids that the model has no embedding for, which JAX would clip without a word."""
    if len(tok) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {tok.name_or_path!r} has {len(tok)} tokens, the model {source!r} only "
            f"{model.config.vocab_size}; they do not belong together"
        )


def shape_of(model: Decoder) -> DecoderConfig:
    """What two models must share to run with each other's weights."""
    return dataclasses.replace(model.config, source_config="")


def place(tree: Params, axes: Params, mesh: Mesh) -> Params:
    """Places part of a parameter tree by the logical axes of the whole tree."""
    if not isinstance(tree, dict):
        return jax.device_put(tree, param_shardings(axes, mesh))
    return {name: place(value, axes[name], mesh) for name, value in tree.items()}


def pad_id(tok: Any) -> int:
    """What fills rows up; masks keep it out of everything, so that any id will do."""
    return 0 if tok.pad_token_id is None else int(tok.pad_token_id)
