"""From a run's configuration to what the training loop turns: one function an algorithm.

A `Task` hides from the loop what differs between algorithms: how a batch of data becomes batches
for the step (nothing in SFT and reward modelling, reference log-probabilities in DPO, a rollout
cut into mini-batches in PPO), and what is measured on held-out data.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign.algorithms import dpo, kto, ppo, reward, sft
from jaxalign.algorithms.step import Loss, Step, init_state, make_eval
from jaxalign.config import (
    DataConfig,
    DPORun,
    KTORun,
    ModelConfig,
    PPORun,
    RewardRun,
    SFTRun,
)
from jaxalign.data import (
    Batches,
    graded_batches,
    preference_batches,
    prompt_batches,
    ranked_batches,
    sft_batches,
    step_batches,
    stop_token_ids,
    unpaired_batches,
)
from jaxalign.export import run_tokenizer, whole_model
from jaxalign.heldout import HeldOut
from jaxalign.hf import load_pretrained, save_pretrained
from jaxalign.metrics import add_up, to_floats
from jaxalign.models.base import DecoderConfig, combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.heads import Scorer, weigh_attributes, with_scalar_head
from jaxalign.models.lora import add_lora
from jaxalign.optim import OptimizerConfig, make_optimizer
from jaxalign.references import hold_reference, keep_reference, reference_optimizer
from jaxalign.rewards import model_reward
from jaxalign.sharding import (
    CompiledStep,
    compile_step,
    make_mesh,
    param_shardings,
    row_shards,
    shard_batch,
)
from jaxalign.types import Params, RolloutBatch, TrainState

Floats = dict[str, float]
Loop = dict[str, Any]
"""JSON-able state of the loop besides the train state: the KL coefficient of PPO."""


class Task(NamedTuple):
    """What the loop needs of an algorithm.

    Attributes:
      state: the train state at the start.
      step: compiled.
      batches: training data.
      total: batches (iterations, in PPO) in all.
      loop: starting value of the loop's own state.
      expand: (key, state, batch, loop) → (batches for the step, metrics known before the update).
        May change `loop`.
      evaluate: state → held-out figures, or None without held-out data.
      export: (state, folder) → None; writes the weights in Hugging Face form.
      details: curves and tables of the last evaluation, JSON-able, or None.
    """

    state: TrainState
    step: CompiledStep
    batches: Batches[Any]
    total: int
    loop: Loop
    expand: Callable[[jax.Array, TrainState, Any, Loop], tuple[Iterable[Any], Floats]]
    evaluate: Callable[[TrainState], Floats] | None
    export: Callable[[TrainState, Any], None]
    details: Callable[[], dict[str, Any]] | None = None


class Loaded(NamedTuple):
    """A model with its tokenizer and split parameters, on a mesh."""

    model: Any
    params: Params
    frozen: Params
    tok: Any


def make_task(config: Any) -> Task:
    """The task of a configuration made by `load_config`."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_rows(config, mesh)
    makers: dict[type, Callable[..., Task]] = {
        SFTRun: sft_task,
        RewardRun: reward_task,
        DPORun: dpo_task,
        KTORun: kto_task,
        PPORun: ppo_task,
    }
    return makers[type(config)](config, mesh)


def _check_rows(config: Any, mesh: Mesh) -> None:
    """Refuses a batch that cannot be split evenly, before anything is loaded or sampled."""
    parts = {"data × fsdp": row_shards(mesh), "run.micro_batches": config.run.micro_batches}
    if isinstance(config, PPORun):
        parts["minibatches"] = config.minibatches
    unit = math.prod(parts.values())
    if config.data.rows % unit:
        raise ValueError(
            f"data.rows={config.data.rows}: {config.data.rows} rows do not divide into "
            f"{', '.join(f'{name} = {size}' for name, size in parts.items())}; "
            f"use a multiple of {unit} rows"
        )


def sft_task(config: SFTRun, mesh: Mesh) -> Task:
    """SFT: every batch of conversations is one update."""
    loaded = _load_policy(config.model, mesh, config.run.seed)
    batches, held_out = _data(sft_batches, config, loaded.tok)
    total = _total(config, batches)
    tx = _optimizer(config.optimizer, total)
    return Task(
        *_start(
            loaded,
            tx,
            sft.make_step(
                loaded.model,
                tx,
                config.sft,
                micro_batches=config.run.micro_batches,
                sources=batches.sources,
            ),
            mesh,
        ),
        batches=batches,
        total=total,
        loop={},
        expand=lambda key, state, batch, loop: ([batch], {}),
        evaluate=_evaluate(
            sft.make_loss(loaded.model, config.sft, sources=_names(held_out)), held_out, mesh
        ),
        export=_exporter(loaded.model, loaded.tok),
    )


def reward_task(config: RewardRun, mesh: Mesh) -> Task:
    """Reward model: every batch of judged answers is one update."""
    loaded = _with_head(_load(config.model, mesh, config.run.seed), mesh, config)
    batches, held_out = _data(_judgements(config), config, loaded.tok)
    total = _total(config, batches)
    tx = _optimizer(config.optimizer, total)
    micro = config.run.micro_batches
    measure = None
    if held_out is not None:
        measure = HeldOut(loaded.model, config.reward, held_out, mesh)
    return Task(
        *_start(
            loaded,
            tx,
            reward.make_step(
                loaded.model, tx, config.reward, micro_batches=micro, sources=batches.sources
            ),
            mesh,
        ),
        batches=batches,
        total=total,
        loop={},
        expand=lambda key, state, batch, loop: ([batch], {}),
        evaluate=measure,
        export=_exporter(loaded.model, loaded.tok),
        details=None if measure is None else measure.details,
    )


def _judgements(config: RewardRun) -> Callable[..., Batches[Any]]:
    """What makes the batches that the objective learns from."""
    if config.reward.objective == "regression":
        return functools.partial(graded_batches, attributes=config.reward.attributes)
    if config.reward.objective == "ranking":
        return functools.partial(ranked_batches, answers=config.answers)
    return step_batches if config.reward.objective == "steps" else preference_batches


def dpo_task(config: DPORun, mesh: Mesh) -> Task:
    """DPO: a batch of pairs gets the reference's log-probabilities, then is one update."""
    loaded = _load_policy(config.model, mesh, config.run.seed)
    load = functools.partial(_reference, loaded=loaded, config=config.model, mesh=mesh)
    batches, held_out = _data(preference_batches, config, loaded.tok)
    total = _total(config, batches)
    cache = None
    if config.reference_cache is not None:
        every = lambda: itertools.chain(  # noqa: E731
            itertools.islice(batches, total), held_out or ()
        )
        cache = keep_reference(config, loaded, every, load)
    tx = reference_optimizer(_optimizer(config.optimizer, total), config.reference_sync)
    micro = config.run.micro_batches
    state, step = _start(
        loaded,
        tx,
        dpo.make_step(loaded.model, tx, config.dpo, micro_batches=micro, sources=batches.sources),
        mesh,
    )
    if cache is not None:
        prepare = lambda state, batch: cache.fill(batch)  # noqa: E731
    elif config.dpo.has_reference:
        state, reference = hold_reference(config, loaded, state, load)
        add = dpo.make_prepare(reference.model, config.dpo)
        prepare = lambda state, batch: add(reference.params(state), batch)  # noqa: E731
    else:
        prepare = lambda state, batch: batch  # noqa: E731
    return Task(
        state,
        step,
        batches=batches,
        total=total,
        loop={},
        expand=lambda key, state, batch, loop: ([prepare(state, batch)], {}),
        evaluate=_evaluate(
            dpo.make_loss(loaded.model, config.dpo, sources=_names(held_out)),
            held_out,
            mesh,
            prepare,
        ),
        export=_exporter(loaded.model, loaded.tok),
    )


def kto_task(config: KTORun, mesh: Mesh) -> Task:
    """KTO: a batch of answers gets what policy and reference say of it, then is one update."""
    loaded = _load_policy(config.model, mesh, config.run.seed)
    load = functools.partial(_reference, loaded=loaded, config=config.model, mesh=mesh)
    batches, held_out = _data(unpaired_batches, config, loaded.tok)
    total = _total(config, batches)
    tx = reference_optimizer(_optimizer(config.optimizer, total), config.reference_sync)
    micro = config.run.micro_batches
    state, step = _start(
        loaded,
        tx,
        kto.make_step(loaded.model, tx, config.kto, micro_batches=micro, sources=batches.sources),
        mesh,
    )
    state, reference = hold_reference(config, loaded, state, load)
    add = kto.make_prepare(loaded.model, reference.model)
    prepare = lambda state, batch: add(state, reference.params(state), batch)  # noqa: E731
    return Task(
        state,
        step,
        batches=batches,
        total=total,
        loop={},
        expand=lambda key, state, batch, loop: ([prepare(state, batch)], {}),
        evaluate=_evaluate(
            kto.make_loss(loaded.model, config.kto, sources=_names(held_out)),
            held_out,
            mesh,
            prepare,
        ),
        export=_exporter(loaded.model, loaded.tok),
    )


def ppo_task(config: PPORun, mesh: Mesh) -> Task:
    """PPO: a batch of prompts becomes a rollout, cut into epochs × mini-batches of updates."""
    loaded = _load_policy(config.model, mesh, config.run.seed)
    if config.reference is None:
        ref_params = loaded.params
    else:
        reference, ref_params = _policy(config.reference, config.model, mesh)
        if _shape(reference) != _shape(loaded.model):
            raise ValueError(
                f"reference={config.reference!r} has another shape than the policy "
                f"{config.model.source!r}; wanted the model that the policy started from"
            )
    scorer, rm_params = _scorer(config.reward_model, config, mesh)
    _check_vocabulary(loaded.tok, scorer, config.reward_model)
    if config.critic is None:
        critic, critic_params = scorer, rm_params
    else:
        critic, critic_params = _scorer(config.critic, config, mesh, critic=True)
        _check_vocabulary(loaded.tok, critic, config.critic)
    if config.critic_head == "zero":
        head = jax.tree.map(jnp.zeros_like, critic_params["score"])
        critic_params = critic_params | {"score": head}
    options = config.ppo
    if not options.stop_tokens:
        stops = stop_token_ids(loaded.tok, config.model.chat_template)
        options = dataclasses.replace(options, stop_tokens=stops)
    if options.pad_token == 0:
        options = dataclasses.replace(options, pad_token=_pad(loaded.tok))

    batches, held_out = _data(prompt_batches, config, loaded.tok)
    total = _total(config, batches)
    updates = total * config.ppo_epochs * config.minibatches
    policy_optimizer = config.optimizer
    critic_optimizer = config.critic_optimizer or policy_optimizer
    tx = ppo.make_optimizer(
        _optimizer(policy_optimizer, updates), _optimizer(critic_optimizer, updates)
    )
    start = loaded._replace(params=ppo.init_params(loaded.params, critic_params))
    step = ppo.make_step(loaded.model, critic, tx, options, micro_batches=config.run.micro_batches)
    prepare = ppo.make_prepare(loaded.model, critic, model_reward(scorer, rm_params), options)

    def expand(
        key: jax.Array, state: TrainState, batch: Any, loop: Loop
    ) -> tuple[Iterable[RolloutBatch], Floats]:
        sample_key, shuffle_key = jax.random.split(key)
        rollout = prepare(sample_key, state, ref_params, batch, loop["kl_coef"])
        metrics = to_floats(ppo.rollout_metrics(rollout)) | {"kl_coef": loop["kl_coef"]}
        answers = int(jnp.sum(rollout.valid))  # pyrefly: ignore[bad-argument-type]
        loop["kl_coef"] = ppo.next_kl_coef(
            loop["kl_coef"], metrics["objective/kl"], options, answers
        )
        parts = ppo.minibatches(shuffle_key, rollout, config.ppo_epochs, config.minibatches)
        return parts, metrics

    def evaluate(state: TrainState) -> Floats:
        # The same key every time: differences come from the policy, not from the draw.
        key = jax.random.fold_in(jax.random.key(config.run.seed), 2**31 - 1)
        sums: dict[str, float] = {}
        scores: list[float] = []
        for number, batch in enumerate(held_out or ()):
            rollout = prepare(jax.random.fold_in(key, number), state, ref_params, batch)
            answered = np.asarray(rollout.valid)
            scores += np.asarray(rollout.scores)[answered].tolist()
            for name, value in to_floats(ppo.rollout_metrics(rollout)).items():
                if name.startswith(("objective/", "response/")):
                    sums[name] = sums.get(name, 0.0) + value * int(answered.sum())
        means = {name: value / len(scores) for name, value in sums.items()}
        return means | {"objective/scores_std": float(np.std(scores))}

    def export(state: TrainState, folder: Any) -> None:
        save_pretrained(loaded.model, state.params["policy"], folder, tokenizer=loaded.tok)

    return Task(
        *_start(start, tx, step, mesh),
        batches=batches,
        total=total,
        loop={"kl_coef": options.kl_coef},
        expand=expand,
        evaluate=evaluate if held_out is not None else None,
        export=export,
    )


def load_data(config: Any) -> tuple[Any, Batches[Any], Batches[Any] | None]:
    """Tokenizer, training and held-out data of a run as it would see them; loads no model."""
    makers: dict[type, Callable[..., Batches[Any]]] = {
        SFTRun: sft_batches,
        RewardRun: preference_batches,
        DPORun: preference_batches,
        PPORun: prompt_batches,
    }
    tok = run_tokenizer(config.model)
    return tok, *_data(makers[type(config)], config, tok)


# --- parts ---------------------------------------------------------------------------------------


def _load(config: ModelConfig, mesh: Mesh, seed: int) -> Loaded:
    tok = run_tokenizer(config)
    model, params = load_pretrained(
        config.source,
        mesh=mesh,
        dtype=config.dtype,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
    )
    _check_vocabulary(tok, model, config.source)
    if config.lora is None:
        return Loaded(model, params, {}, tok)
    if isinstance(model, Scorer):
        raise ValueError(
            f"model.lora with the reward model {config.source!r}: start from a language model"
        )
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 2)
    model, adapters, base = add_lora(model, params, key, config.lora)
    return Loaded(model, _put(adapters, model.axes, mesh), base, tok)


def _check_vocabulary(tok: Any, model: Decoder | Scorer, source: str) -> None:
    """Refuses ids that the model has no embedding for, which JAX would clip without a word."""
    if len(tok) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {tok.name_or_path!r} has {len(tok)} tokens, the model {source!r} only "
            f"{model.config.vocab_size}; they do not belong together"
        )


def _shape(model: Decoder) -> DecoderConfig:
    """What two models must share to run with each other's weights."""
    return dataclasses.replace(model.config, source_config="")


def _load_policy(config: ModelConfig, mesh: Mesh, seed: int) -> Loaded:
    loaded = _load(config, mesh, seed)
    if not isinstance(loaded.model, Decoder):
        raise ValueError(
            f"model.source={config.source!r} is a reward model; wanted a language model"
        )
    return loaded


def _with_head(loaded: Loaded, mesh: Mesh, config: RewardRun) -> Loaded:
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
    head = _put({"score": full.pop("score")}, scorer.axes, mesh)
    if loaded.frozen:
        return loaded._replace(model=scorer, params=loaded.params | head, frozen=full)
    return loaded._replace(model=scorer, params=full | head)


def _policy(source: str, config: ModelConfig, mesh: Mesh) -> tuple[Decoder, Params]:
    model, params = load_pretrained(
        source, mesh=mesh, dtype=config.dtype, compute_dtype=config.compute_dtype
    )
    if not isinstance(model, Decoder):
        raise ValueError(f"reference={source!r} is a reward model; wanted a language model")
    return model, params


def _reference(
    source: str, *, loaded: Loaded, config: ModelConfig, mesh: Mesh
) -> tuple[Decoder, Params]:
    model, params = _policy(source, config, mesh)
    _check_vocabulary(loaded.tok, model, source)
    return model, params


def _scorer(
    source: str, config: PPORun, mesh: Mesh, *, critic: bool = False
) -> tuple[Scorer, Params]:
    """A reward model with one score: of several attributes, their weighted sum."""
    model, params = load_pretrained(
        source,
        mesh=mesh,
        dtype=config.model.dtype,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
    )
    if not isinstance(model, Scorer):
        raise ValueError(
            f"{source!r} is a language model without a score; wanted a reward model, "
            "as `jaxalign reward` makes"
        )
    # A critic of its own may have one score where the reward model has several.
    if config.reward_weights is not None and not (critic and not model.attributes):
        return weigh_attributes(model, params, config.reward_weights)
    if len(model.attributes) > 1:
        raise ValueError(
            f"{source!r} has the attributes {', '.join(model.attributes)} and no single score; say "
            "how much each counts: reward_weights: {" + f"{model.attributes[0]}: 1.0" + "}"
        )
    return model, params


def _put(tree: Params, axes: Params, mesh: Mesh) -> Params:
    """Places part of a parameter tree by the logical axes of the whole tree."""
    if not isinstance(tree, dict):
        return jax.device_put(tree, param_shardings(axes, mesh))
    return {name: _put(value, axes[name], mesh) for name, value in tree.items()}


def _pad(tok: Any) -> int:
    return 0 if tok.pad_token_id is None else int(tok.pad_token_id)


def _data(
    make: Callable[..., Batches[Any]], config: Any, tok: Any
) -> tuple[Batches[Any], Batches[Any] | None]:
    """Training data, and held-out data or None."""
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
        "host": (jax.process_index(), jax.process_count()),
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
    if data.eval:
        return train, make(data.eval, tok, epochs=1, shuffle=False, **shape)
    if data.validation is None:
        return train, None
    # Weights and numbers of rows shape what is trained; what was held out is measured whole.
    whole = [
        source
        if isinstance(source, str)
        else dataclasses.replace(source, weight=None, rows=None, epochs=None)
        for source in data.train
    ]
    held_out = make(whole, tok, split="validation", epochs=1, shuffle=False, **shape, **copies)
    return train, held_out


def _names(batches: Batches[Any] | None) -> tuple[str, ...]:
    """The sources by which figures are also logged."""
    return () if batches is None else batches.sources


def _total(config: Any, batches: Batches[Any]) -> int:
    if config.data.epochs is None or config.data.streaming:
        return config.run.steps
    return min(len(batches), config.run.steps or len(batches))


def _optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    if config.total_steps is None:
        config = dataclasses.replace(config, total_steps=updates)
    return make_optimizer(config)


def _start(
    loaded: Loaded, tx: optax.GradientTransformation, step: Step, mesh: Mesh
) -> tuple[TrainState, CompiledStep]:
    state = init_state(loaded.params, tx, loaded.frozen)
    return state, compile_step(step, state, mesh)


def _evaluate(
    loss: Loss,
    held_out: Batches[Any] | None,
    mesh: Mesh,
    prepare: Callable[[TrainState, Any], Any] = lambda state, batch: batch,
) -> Callable[[TrainState], Floats] | None:
    if held_out is None:
        return None
    batches, evaluate = held_out, make_eval(loss)

    def run(state: TrainState) -> Floats:
        with jax.set_mesh(mesh):
            parts = [evaluate(state, shard_batch(prepare(state, b), mesh)) for b in batches]
            return add_up(parts)

    return run


def _exporter(model: Any, tok: Any) -> Callable[[TrainState, Any], None]:
    def export(state: TrainState, folder: Any) -> None:
        plain, params = whole_model(model, combine(state.params, state.frozen))
        save_pretrained(plain, params, folder, tokenizer=tok)

    return export
