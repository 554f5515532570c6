"""The programs of a PPO iteration: prefill, decode, score, experience, update."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.algorithms.ppo.experience import num_columns
from jaxalign.models.backend import backend
from jaxalign.models.base import DecoderConfig, combine
from jaxalign.models.flops import below_adapters, full_rows, row_flops, training_flops
from jaxalign.models.moe import expert_dtype
from jaxalign.parallel.sharding import replicated, use_mesh
from jaxalign.plan.loader import ShapeLoader
from jaxalign.plan.programs import Compiler, Log, chunks, device_bytes, on_rows
from jaxalign.run.tasks.models import reshard_by_rules
from jaxalign.run.tasks.ppo import RolloutParts, name_of
from jaxalign.run.tasks.shapes import array, as_shapes
from jaxalign.sampling import stream
from jaxalign.sampling.draw import Sampling
from jaxalign.sampling.engine import decode, empty_slots, read_prompts, split_layers, stages
from jaxalign.sampling.speculate import advance_until, begin, widen
from jaxalign.sampling.weights import convert, sampling_model
from jaxalign.types import Params, RolloutBatch, Scores, TokenBatch, TrainState

# Scalars and keys have no sharding where a run makes them without a mesh in context.


def compile_iteration(
    compiler: Compiler, config: Any, state: TrainState, parts: RolloutParts, log: Log
) -> None:
    """Compiles every program of one PPO iteration.

    Args:
      compiler: records the programs.
      config: the run's config.
      state: its train state, as shapes.
      parts: its parts.
      log: called with a line about the progress.
    """
    policy = combine(state.params, state.frozen)["policy"]
    with config.mesh.use_rules("rollout"):
        _compile_sampling(compiler, config, parts, policy, log)
    tokens = answer_shapes(config, parts, compiler.mesh)
    _compile_scores(compiler, parts, tokens)
    rollout = _compile_experience(compiler, config, state, parts, tokens)
    _compile_update(compiler, config, state, parts, rollout)


def _compile_sampling(
    compiler: Compiler, config: Any, parts: RolloutParts, policy: Params, log: Log
) -> None:
    """Compiles the programs of `sampling.generate.sample`."""
    model, mesh, options = parts.policy, compiler.mesh, parts.options
    rules = config.mesh.rules_of.get("rollout")
    if options.sampling_weights is not None:
        model, policy = _narrower(compiler, model, policy, options.sampling_weights)
    # With rules or in fewer bits, it has its own copy while it generates.
    known = () if rules or options.sampling_weights is not None else policy
    params = reshard_by_rules(policy, model, mesh, rules, ShapeLoader())
    length, new = config.data.length, options.max_new_tokens
    answers = config.data.rows * options.samples
    slots = answers if options.slots is None else min(options.slots, answers)
    group = min(config.data.rows, slots)  # prompts that are prefilled together
    kind = jnp.dtype(options.cache_dtype or model.compute_dtype).name
    tokens = on_rows(array(group, length, dtype=jnp.int32), mesh)
    mask = on_rows(array(group, length, dtype=jnp.bool_), mesh)
    number, integer = array(), array(dtype=jnp.int32)
    whole = replicated(mesh)  # like the arrays that `sample` makes with the mesh in context
    first = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    last = jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole)
    stops = array(len(options.stop_tokens), dtype=jnp.int32)
    sampling = Sampling(number, integer, number, stops, integer)
    key = as_shapes(jax.eval_shape(lambda: jax.random.key(0)))

    def lower_slots() -> Any:
        limits = array(answers, dtype=jnp.int32)
        with use_mesh(mesh):
            return empty_slots.lower(
                model, integer, limits, slots=slots, prompt_length=length, max_new_tokens=new,
                cache_dtype=kind, keep_experts=options.router_replay,
            )  # fmt: skip

    def lower_prefill() -> Any:
        with use_mesh(mesh):
            return read_prompts.lower(
                model, params, tokens, mask, first, kind, keep_experts=options.router_replay
            )

    compiled = compiler(
        "prefill", lower_prefill, known=known, batch=(tokens, mask),
        times=math.ceil(config.data.rows / group), made="cache",
        useful=row_flops(model.config, group, length, head=False),
    )  # fmt: skip
    if options.speculate:
        prompts = _results(lower_prefill(), compiled)
        _compile_speculation(compiler, model, params, known, prompts, tokens, sampling, options)
        return
    log("compiling empty slots …")
    lowered = lower_slots()
    state = _results(lowered, lowered.compile())
    # The slots are there before the prompts are read.
    prefill = compiler.done[-1]
    cache = prefill.cache + device_bytes(state)
    compiler.done[-1] = dataclasses.replace(prefill, cache=cache)
    prompts = _results(lower_prefill(), compiled)

    if options.score_early:
        _compile_watched(compiler, model, params, known, state, prompts, key, sampling, options)
        return

    def lower_decode() -> Any:
        with use_mesh(mesh):
            return decode.lower(
                model, params, state, prompts, key, sampling, last, samples=options.samples
            )

    with use_mesh(mesh):
        loops = len(stages(new)) if slots == answers else 1
    compiler(
        "decode", lower_decode, known=known, batch=(tokens, mask), cache=(state, prompts),
        trips=math.ceil(new / loops), times=math.ceil(answers / slots),
        useful=_decode_flops(model.config, slots, length, new),
    )  # fmt: skip


def _compile_watched(
    compiler: Compiler, model: Any, params: Params, known: Any, state: Any, prompts: Any, key: Any,
    sampling: Sampling, options: Any,
) -> None:  # fmt: skip
    """Compiles the decode loop that stops every few tokens, for its last and largest cache."""
    mesh, new = compiler.mesh, options.max_new_tokens
    length, slots = prompts.cache.segment_ids.shape[1], state.row.shape[0]
    with use_mesh(mesh):
        ends = stages(new)
        params = _by_layer(model, params)
        lowered = stream.fill.lower(
            state, prompts, columns=length + ends[0], samples=options.samples
        )
        filled = _results(lowered, lowered.compile())
        for end in ends:
            lowered = stream.widen.lower(filled, columns=length + end)
            filled = _results(lowered, lowered.compile())

    def lower_loop() -> Any:
        until = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
        with use_mesh(mesh):
            return stream.decode_until.lower(
                model, params, filled, key, sampling, until, ring_start=length
            )

    compiler(
        "decode", lower_loop, known=known, cache=(filled, prompts), trips=new,
        useful=_decode_flops(model.config, slots, length, new),
    )  # fmt: skip


def _compile_speculation(
    compiler: Compiler, model: Any, params: Params, known: Any, prompts: Any, tokens: Any,
    sampling: Sampling, options: Any,
) -> None:  # fmt: skip
    """Compiles the decode loop with drafts, for its last and largest cache.

    Its costs are those of a step for each token, as if no draft were ever accepted.
    """
    (count, length), new = tokens.shape, options.max_new_tokens
    answers, mesh, ahead = count * options.samples, compiler.mesh, options.speculate
    key = as_shapes(jax.eval_shape(lambda: jax.random.key(0)))
    number = array(dtype=jnp.int32)
    with use_mesh(mesh):
        params = _by_layer(model, params)
        lowered = begin.lower(
            model, params, prompts, tokens, array(answers, dtype=jnp.int32), key, sampling,
            samples=options.samples, longest=new, speculate=ahead,
        )  # fmt: skip
        begun = _results(lowered, lowered.compile())
        lowered = widen.lower(begun, columns=length + new + ahead)
        begun = _results(lowered, lowered.compile())

    def lower_loop() -> Any:
        with use_mesh(mesh):
            return advance_until.lower(
                model, params, begun, key, sampling, number,
                prompt_length=length, stage_end=new, speculate=ahead,
            )  # fmt: skip

    compiler(
        "decode", lower_loop, known=known, cache=(begun, prompts), trips=new,
        useful=_decode_flops(model.config, answers, length, new),
    )  # fmt: skip


def _by_layer(model: Any, params: Params) -> Params:
    """The parameters as a decode loop that starts more than once reads them."""
    if not backend().decode_weights_by_layer:
        return params
    lowered = split_layers.lower(model, params)
    return _results(lowered, lowered.compile())


def _decode_flops(config: DecoderConfig, rows: int, length: int, new: int) -> float:
    """FLOPs of so many new tokens in each row, after prompts of `length`."""
    written = row_flops(config, rows, length + new, head=False)
    written -= row_flops(config, rows, length, head=False)
    return written + 2.0 * rows * new * config.hidden_size * config.vocab_size


def _narrower(compiler: Compiler, model: Any, policy: Params, kind: str) -> tuple[Any, Params]:
    """The model and the weights that sampling reads, see `sampling.weights`."""
    model = sampling_model(model, kind)

    def lower() -> Any:
        with use_mesh(compiler.mesh):
            return convert.lower(model, policy, kind)

    return model, _results(lower(), compiler("sampling weights", lower, known=policy))


def _results(lowered: Any, compiled: Any) -> Any:
    """A program's results as shapes, with its output shardings."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )


def answer_shapes(config: Any, parts: RolloutParts, mesh: Mesh) -> TokenBatch:
    """Prompts with their answers, `[B · samples, P + R]`."""
    shape = (config.sequences, config.data.length + parts.options.max_new_tokens)
    ids, mask = array(*shape, dtype=jnp.int32), array(*shape, dtype=jnp.bool_)
    return on_rows(TokenBatch(ids, ids, ids, ids, mask), mesh)


def _compile_scores(compiler: Compiler, parts: RolloutParts, tokens: TokenBatch) -> None:
    """Compiles the reward models; one with its own tokenizer is assumed to read as many tokens."""
    for number, scorer in enumerate(parts.reward_models):

        def lower(scorer: Any = scorer) -> Any:
            with use_mesh(compiler.mesh):
                return scorer.reward().lower(scorer.params, tokens)

        useful = row_flops(scorer.model.config, *tokens.inputs.shape, head=False)
        compiler(f"score{number or ''}", lower, known=scorer.params, batch=tokens, useful=useful)


class Experience(NamedTuple):
    """The program that turns answers and scores into a rollout.

    Attributes:
      lowered: the program.
      known: its arguments that are in memory all the time.
      batch: the others.
    """

    lowered: Any
    known: Any
    batch: Any


def lower_experience(
    config: Any, state: TrainState, parts: RolloutParts, tokens: TokenBatch, mesh: Mesh
) -> Experience:
    """Lowers the half of PPO's `prepare` after scoring."""
    assert parts.reference is not None
    rows, length = tokens.inputs.shape
    scores, recorded, finished = on_rows(
        (array(rows), array(rows, length), array(rows, dtype=jnp.bool_)), mesh
    )
    reference = parts.reference.params(state)
    scale = (array(), array()) if parts.options.normalize_scores else None
    experts, model = None, parts.policy.config
    if parts.options.router_replay:
        shape = (rows, length, model.num_layers, model.experts_per_token)
        experts = on_rows(array(*shape, dtype=expert_dtype(model)), mesh)
    columns = None
    with use_mesh(mesh):
        count = num_columns(length - 1, parts.options)
    if count is not None:
        columns = on_rows(array(rows, count, dtype=jnp.int32), mesh)
    lowered = parts.rollout.lower(
        state, reference, tokens, scores, finished, recorded, array(), array(), scale,
        experts=experts, columns=columns,
    )  # fmt: skip
    known = (state.params, state.frozen, reference)
    return Experience(lowered, known, (tokens, scores, finished, recorded, experts))


def rollout_shapes(config: Any, experience: Experience) -> RolloutBatch:
    """The rollout that the program gives, with the scores of each reward."""
    rollout = as_shapes(experience.lowered.out_info)
    rows = rollout.advantages.shape[0]
    part = Scores(array(rows), array(rows, dtype=jnp.bool_))
    return rollout._replace(reward_parts={name_of(spec): part for spec in config.reward_specs()})


def update_shapes(config: Any, parts: RolloutParts, rollout: RolloutBatch) -> RolloutBatch:
    """The inputs of an update: a mini-batch of the rollout, and a batch of text if there is one."""
    rows = rollout.advantages.shape[0] // config.minibatches
    part = jax.tree.map(lambda x: array(rows, *x.shape[1:], dtype=x.dtype), rollout)
    return part._replace(ptx=parts.text)


def _compile_experience(
    compiler: Compiler, config: Any, state: TrainState, parts: RolloutParts, tokens: TokenBatch
) -> RolloutBatch:
    """Compiles log-probabilities, values and advantages; returns the rollout's shapes."""
    rows, length = tokens.inputs.shape
    experience = lower_experience(config, state, parts, tokens, compiler.mesh)
    useful = 2 * row_flops(parts.policy.config, rows, length - 1, head=True)
    useful += _critic_flops(parts, rows, length - 1)
    if parts.shares_lower_states(state):
        useful -= below_adapters(parts.policy, full_rows(rows, length - 1))
    compiler(
        "experience",
        lambda: experience.lowered,
        known=experience.known,
        batch=experience.batch,
        made="batch",
        useful=useful,
        trips=chunks(parts.policy, rows, length - 1, compiler.mesh)[1],
    )
    return rollout_shapes(config, experience)


def _compile_update(
    compiler: Compiler, config: Any, state: TrainState, parts: RolloutParts, rollout: RolloutBatch
) -> None:
    """Compiles an update on a mini-batch, while the whole rollout is in memory."""
    mesh, model = compiler.mesh, parts.policy
    batch = on_rows(update_shapes(config, parts, rollout), mesh)
    rows, length = batch.advantages.shape
    work, keep = full_rows(rows, length), parts.options.keep_lower_states
    useful = training_flops(model, work, frozen=parts.adapted, head=True, keep_lower_states=keep)
    if parts.critic is not None and not parts.options.shared_critic:
        adapted = parts.critic.base.lora is not None
        useful += training_flops(
            parts.critic, work, frozen=adapted, head=False, keep_lower_states=keep
        )
    compiler(
        "update",
        lambda: parts.step.lower(state, batch),
        known=state,
        batch=(batch, on_rows(rollout, mesh)),
        times=config.ppo_epochs * config.minibatches,
        trips=chunks(model, rows // config.run.micro_batches, length, mesh)[1],
        useful=useful,
    )


def _critic_flops(parts: RolloutParts, rows: int, length: int) -> float:
    if parts.critic is None or parts.options.shared_critic:
        return 0.0
    return row_flops(parts.critic.config, rows, length, head=False)
