"""PPO: a batch of prompts becomes a rollout, split into epochs × mini-batches of updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms import ppo
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.ppo.prepare import early_watch
from jaxalign.algorithms.ppo.rows import without_lower_states
from jaxalign.algorithms.prepare import Prepare
from jaxalign.data import Batches, sft_batches, stop_token_ids
from jaxalign.models.flops import ppo_flops
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import all_gather_rows, local_rows
from jaxalign.rewards import build_reward, combine_rewards, model_reward
from jaxalign.rewards.cases import shifted
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.rewards.specs import RewardSpec
from jaxalign.run.config.ppo import PPORun
from jaxalign.run.metrics import FLOPS, TOKENS, Stopwatch, add_up, to_floats
from jaxalign.run.remote import local_folder
from jaxalign.run.tasks.data import section_data
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.models import (
    Scorers,
    check_same_shape,
    load_critic,
    load_policy,
    pad_id,
    with_adapters,
)
from jaxalign.run.tasks.parts import (
    Parts,
    RunData,
    learning_rates,
    scheduled_optimizer,
    with_guard,
)
from jaxalign.run.tasks.reference import reference_in_memory
from jaxalign.run.tasks.rollout_log import RolloutDump
from jaxalign.run.tasks.shapes import token_shapes
from jaxalign.run.tasks.streams import Stream, stream_key
from jaxalign.run.tasks.task import Floats, Loop, Task, exporter, whole_policy
from jaxalign.sampling.refill import refilled_slots
from jaxalign.types import Params, PromptBatch, RolloutBatch, TokenBatch, TrainState


class RewardModel(NamedTuple):
    """A reward that is a model.

    Attributes:
      spec: its configuration.
      model: the model.
      params: its parameters, on devices or in host memory.
    """

    spec: ModelReward
    model: Scorer
    params: Params

    def reward(self) -> Any:
        """A reward function of its scores, with `.lower` for (params, tokens)."""
        return model_reward(self.model, self.params, shift=self.spec.shift, scale=self.spec.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutParts(Parts):
    """The parts of a run whose batches are prompts and whose updates use rollouts.

    Attributes:
      options: the algorithm's options, with the tokenizer's stop and padding tokens.
      critic: the critic's model, or None.
      reward_models: the models among the rewards.
      reward: scores the answers.
      rollout: (key, state, reference parameters, prompts, …) → rollout, see `ppo.make_prepare`.
      watch: times the parts "rollout" and "reward"; the rest is experience.
      text: the batch of `ptx` text in each update, as shapes; None: no text.
    """

    options: ppo.Config
    critic: Scorer | None
    reward_models: tuple[RewardModel, ...]
    reward: Callable[..., Any]
    rollout: Prepare[..., RolloutBatch]
    watch: Stopwatch
    text: TokenBatch | None

    @property
    def frozen_params(self) -> tuple[Params, ...]:
        """Also includes the reward models' parameters."""
        return (*super().frozen_params, *(scorer.params for scorer in self.reward_models))

    def shares_lower_states(self, state: TrainState) -> bool:
        """Whether the reference takes the policy's lower states, see `ppo.make_experience`."""
        if not self.options.keep_lower_states or self.reference is None:
            return False
        return self.reference.shares_layers(self.policy, state)


def build_ppo(
    config: PPORun, mesh: Mesh, loader: Loader, data: RunData
) -> tuple[TrainState, RolloutParts]:
    """The parts of a PPO run: four models, of which policy and critic are trained."""
    policy = load_policy(config, mesh, loader, data.tok)
    reference = reference_in_memory(config, policy, mesh, loader, data.tok)
    source = config.model.source
    check_same_shape(reference.model, policy.model, config.reference or source, source)
    scorers = Scorers(config, mesh, loader, data.tok, policy)
    critic, critic_params = load_critic(config, policy, scorers, mesh, loader)
    critic_base: Any = {}
    if config.critic == "adapter" and critic is not None and critic_params is not None:
        critic, critic_params, critic_base = with_adapters(
            config, critic, critic_params, mesh, loader
        )
    options = with_tokens(config, data, policy.model)

    updates = config.ppo_epochs * config.minibatches
    critic_optimizer = config.critic_optimizer or config.optimizer
    tx = ppo.make_optimizer(
        scheduled_optimizer(config.optimizer, max(1, data.total - config.critic_warmup) * updates),
        scheduled_optimizer(critic_optimizer, data.total * updates) if options.has_critic else None,
        critic_warmup=config.critic_warmup * updates,
    )
    tx = with_guard(tx, config.run)
    step = ppo.make_step(policy.model, critic, tx, options, micro_batches=config.run.micro_batches)
    state = loader.init_state(
        ppo.init_params(policy.params, critic_params),
        tx,
        {name: base for name, base in (("policy", policy.frozen), ("critic", critic_base)) if base},
    )
    reward_models = tuple(
        RewardModel(spec, *scorers.reward(spec))
        for spec in config.reward_specs()
        if isinstance(spec, ModelReward)
    )
    reward, watch = make_reward(config, data, scorers, reward_models), Stopwatch()
    if options.score_early and data.tok is not None and data.batches is not None:
        early_watch(reward, PromptBatch(*np.zeros((3, 0, 1), np.int32)), options)  # raises if none
    rollout = ppo.make_prepare(
        policy.model,
        critic,
        watch.around(reward, "rollout", "reward"),
        options,
        reference=reference.model,
        rollout_rules=config.mesh.rules_of.get("rollout"),
    )
    return state, RolloutParts(
        policy=policy.model,
        adapted=bool(policy.frozen),
        step=compile_step(step, state, mesh),
        reference=reference,
        options=options,
        critic=critic,
        reward_models=reward_models,
        reward=reward,
        rollout=rollout,
        watch=watch,
        text=None if config.ptx is None else token_shapes(config.ptx),
        notes=tuple(dict.fromkeys(loader.notes)),
    )


def with_tokens(config: PPORun, data: RunData, model: Any) -> ppo.Config:
    """The options, with the tokenizer's stop and padding tokens if the run sets none."""
    options, tok = config.ppo, data.tok
    if not options.stop_tokens:
        stops = data.stop_tokens
        if tok is not None:
            stops = stop_token_ids(tok, config.model.chat_template, model)
        options = dataclasses.replace(options, stop_tokens=stops)
    if options.pad_token == 0 and tok is not None:
        options = dataclasses.replace(options, pad_token=pad_id(tok))
    return options


def make_reward(
    config: PPORun, data: RunData, scorers: Scorers, models: tuple[RewardModel, ...]
) -> Callable[..., Any]:
    """The weighted sum of all rewards; without a tokenizer, only of the reward models."""
    if data.tok is not None and data.batches is not None:
        # One table of rows for all prompts: training data, then held-out data.
        rows = [*data.batches.examples]
        rows += data.held_out.examples if data.held_out is not None else ()
        template = config.model.chat_template
        return build_reward(
            config.reward_specs(), data.tok, rows=rows, load=scorers.reward, chat_template=template
        )
    if not models:
        return _no_reward
    return combine_rewards(
        {name_of(scorer.spec): scorer.reward() for scorer in models},
        {name_of(scorer.spec): scorer.spec.weight for scorer in models},
    )


def name_of(spec: RewardSpec) -> str:
    """The names under which rewards are logged."""
    return spec.kind if spec.name is None else spec.name


def _no_reward(tokens: TokenBatch, prompts: Any) -> Any:
    raise ValueError("rewards of texts without a tokenizer: nothing can be scored")


def ppo_task(
    config: PPORun, mesh: Mesh, state: TrainState, parts: RolloutParts, data: RunData
) -> Task:
    """Every batch of prompts is an iteration: a rollout, then epochs × mini-batches of updates."""
    iteration = Iteration(config, mesh, parts, data)
    limit = config.target_kl
    return Task(
        state,
        parts.step,
        batches=data.batches,  # pyrefly: ignore[bad-argument-type]
        total=data.total,
        loop={
            "kl_coef": parts.options.kl_coef,
            "iterations": 0,
            "calibration": [0.0, 1.0],
            "score_stats": list(ppo.ScoreStats()),
        },
        prepare_updates=iteration.prepare_updates,
        evaluate=iteration.evaluate if data.held_out is not None else None,
        export=exporter(parts.policy, data.tok, config.model, part="policy"),
        policy=whole_policy(parts.policy, part="policy"),
        on_train_start=iteration.calibrate if config.calibrate_reward != "none" else None,
        early_stop=None if limit is None else lambda logged: _kl_of(logged) > limit,
        async_metrics=False,
        learning_rates=_learning_rates(config, parts, data),
    )


def _learning_rates(config: PPORun, parts: RolloutParts, data: RunData) -> dict[str, np.ndarray]:
    """Learning rates of policy and critic per update; the policy's is 0 in the critic's warm-up."""
    updates = config.ppo_epochs * config.minibatches
    total, waits = data.total * updates, config.critic_warmup * updates
    learns = max(1, data.total - config.critic_warmup) * updates
    policy = np.append(np.zeros(waits, np.float32), learning_rates(config.optimizer, learns))
    rates = {"learning_rate": policy[:total]}
    if parts.options.has_critic:
        optimizer = config.critic_optimizer or config.optimizer
        rates["critic/learning_rate"] = learning_rates(optimizer, total)
    return rates


def check_blow_up(config: PPORun, metrics: dict[str, float]) -> None:
    """Stops a run, before an iteration's updates, if its KL or score is beyond the limits.

    Raises:
      FloatingPointError: |`objective/kl`| is above `stop_kl`, or |`objective/scores`| above
        `stop_score`.
    """
    for name, limit, metric in (
        ("stop_kl", config.stop_kl, "objective/kl"),
        ("stop_score", config.stop_score, "objective/scores"),
    ):
        value = metrics[metric]
        if limit is not None and not abs(value) <= limit:
            raise FloatingPointError(
                f"{metric}={value:.6g} is beyond {name}={limit}; this iteration's updates were not "
                "made. Resume from the last checkpoint with a larger ppo.kl_coef or a lower "
                "learning rate, or look at the answers (dump_every)"
            )


def _kl_of(metrics: dict[str, Any]) -> float:
    return float(metrics["policy/approxkl_avg"])


class Iteration:
    """One iteration of PPO, with calibration and evaluation. `loop` holds state between iterations.

    Args:
      config: the run's config.
      mesh: the run's mesh.
      parts: from `build_ppo`.
      data: prompts.
    """

    def __init__(self, config: PPORun, mesh: Mesh, parts: RolloutParts, data: RunData):
        self._config, self._parts, self._data, self._mesh = config, parts, data, mesh
        self._dump = RolloutDump(
            local_folder(config.run.folder), data.tok, config.dump_every, config.dump_samples
        )
        self._text = None
        if config.ptx is not None:
            self._text = TextStream(config, data.tok, mesh)

    def prepare_updates(
        self, key: jax.Array, state: TrainState, prompts: Any, loop: Loop, data: Iterator[Any]
    ) -> tuple[Iterable[RolloutBatch], Floats]:
        """From prompts to the mini-batches of the iteration's updates, and its metrics.

        1. Sample answers, score them, compute advantages.
        2. Compute metrics; update β and the scores' statistics for the next iteration.
        3. Replace prompts whose answers all have the same score, if configured (dynamic sampling).
        4. Split the rollout into epochs × mini-batches.
        """
        config, options = self._config, self._parts.options
        sample_key, shuffle_key = jax.random.split(key)
        rollout, costs = self._roll_out(sample_key, state, prompts, loop)
        metrics = to_floats(ppo.rollout_metrics(rollout, options.samples, options.kl_estimator))
        metrics["kl_coef"] = loop["kl_coef"]
        check_blow_up(config, metrics)
        # More rollouts of this iteration use the same scaling and β as its first one.
        before = dict(loop)
        self._update_loop(rollout, metrics, loop)
        self._dump.write(loop["iterations"], rollout)
        if config.prompt_draws > 1:
            rollout, more_costs, counts = self._replace_zero_variance(
                rollout, sample_key, state, data, before
            )
            costs = {name: costs[name] + more_costs.get(name, 0.0) for name in costs}
            metrics |= counts
        updates = ppo.minibatches(
            shuffle_key,
            rollout,
            config.ppo_epochs,
            config.minibatches,
            pack=config.pack_updates,
            samples=options.samples if options.shared_prompts else 1,
            multiple=config.run.micro_batches,
        )
        if self._text is not None:
            updates = self._text.join(updates, loop)
        return updates, metrics | costs

    def _roll_out(
        self, key: jax.Array, state: TrainState, prompts: Any, loop: Loop
    ) -> tuple[RolloutBatch, Floats]:
        """A rollout, with its tokens, FLOPs and seconds."""
        parts = self._parts
        parts.watch.start()
        rollout = parts.rollout(
            key, state, self._reference(state), prompts, loop["kl_coef"], **_scaling(loop),
            slots=self._slots(prompts, loop),
        )  # fmt: skip
        jax.block_until_ready(rollout)
        seconds = parts.watch.stop("experience")
        tokens = local_rows(without_lower_states(rollout).tokens)
        flops = ppo_flops(
            tokens,
            parts.policy,
            parts.critic,
            [scorer.model for scorer in parts.reward_models],
            epochs=self._config.ppo_epochs,
            samples=parts.options.samples,
            frozen=parts.adapted,
            shared_critic=parts.options.shared_critic,
            shared_prompts=parts.options.shared_prompts,
            keep_lower_states=parts.options.keep_lower_states,
            shared_reference=parts.shares_lower_states(state),
        )
        real = float(np.sum(tokens.segment_ids > 0))
        return rollout, seconds | {TOKENS: real, FLOPS: flops.total}

    def _slots(self, prompts: PromptBatch, loop: Loop) -> int | None:
        """Slots for this rollout, by the lengths of the last one's answers; None: as configured."""
        options, lengths = self._parts.options, loop.get("answer_lengths")
        if lengths is None or options.slots or options.speculate or options.score_early:
            return None
        answers = prompts.tokens.shape[0] * options.samples
        with self._config.mesh.use_rules("rollout"):
            return refilled_slots(answers, *lengths, mesh=self._mesh)

    def _update_loop(self, rollout: RolloutBatch, metrics: Floats, loop: Loop) -> None:
        """Updates the state for the next iteration: β, lengths, the statistics of all scores."""
        options = self._parts.options
        answers = int(jnp.sum(rollout.valid))  # pyrefly: ignore[bad-argument-type]
        measured_kl = metrics["objective/kl"]
        loop["kl_coef"] = ppo.next_kl_coef(loop["kl_coef"], measured_kl, options, answers)
        loop["answer_lengths"] = [metrics["response/length"], metrics["response/length_max"]]
        if options.normalize_scores:
            stats = ppo.ScoreStats(*loop["score_stats"])
            loop["score_stats"] = list(ppo.next_score_stats(stats, rollout))
        loop["iterations"] += 1

    def _replace_zero_variance(
        self,
        rollout: RolloutBatch,
        key: jax.Array,
        state: TrainState,
        data: Iterator[Any],
        loop: Loop,
    ) -> tuple[RolloutBatch, Floats, Floats]:
        """Dynamic sampling (DAPO): replaces zero-variance groups by other prompts.

        Returns:
          The rollout; its tokens, FLOPs and seconds; the number of batches, and of groups left.
        """
        samples = self._parts.options.samples
        draws, left = 1, ppo.count_equal_groups(rollout, samples)
        costs: Floats = {}
        while left and draws < self._config.prompt_draws:
            # The first rollout uses the unmodified key.
            number_key = jax.random.fold_in(key, draws)
            other, cost = self._roll_out(number_key, state, next(data), loop)
            rollout, left = ppo.fill_equal_groups(rollout, other, samples)
            costs = {name: costs.get(name, 0.0) + value for name, value in cost.items()}
            draws += 1
        return rollout, costs, {"groups/draws": draws, "groups/left_equal": left}

    def calibrate(self, state: TrainState, loop: Loop) -> None:
        """Shifts (and scales) the reward by the reference's answers, before the first iteration."""
        assert self._parts.reference is not None
        assert self._data.batches is not None
        prompts = next(iter(self._data.batches))
        self._data.batches.close()
        loop["calibration"] = list(
            ppo.calibrate(
                stream_key(self._config.run.seed, Stream.CALIBRATION),
                self._parts.reference.model,
                # It generates answers, so its weights are read for every token.
                jax.jit(on_device)(self._reference(state)),
                prompts,
                self._parts.reward,
                self._parts.options,
                self._config.calibrate_reward,
            )
        )

    def evaluate(self, state: TrainState, loop: Loop) -> Floats:
        """Metrics of answers to the held-out prompts: sums over all answers, divided once."""
        # The same key every time: differences come from the policy, not from sampling.
        key = stream_key(self._config.run.seed, Stream.HELD_OUT)
        training, options = self._data.batches, self._parts.options
        samples, estimator = options.samples, options.kl_estimator
        first = 0 if training is None else len(training.examples)
        sums, scores = [], []
        for number, prompts in enumerate(self._data.held_out or ()):
            rollout = self._parts.rollout(
                jax.random.fold_in(key, number),
                state,
                self._reference(state),
                shifted(prompts, first),  # held-out rows follow the training rows
                **_scaling(loop),
            )
            sums.append(ppo.rollout_figures(rollout, samples, estimator))
            valid, values = all_gather_rows((rollout.valid, rollout.scores))
            scores.append(values[valid])
        return add_up(sums) | {"objective/scores_std": float(np.std(np.concatenate(scores)))}

    def _reference(self, state: TrainState) -> Params:
        reference = self._parts.reference
        return None if reference is None else reference.params(state)


def _scaling(loop: Loop) -> dict[str, Any]:
    """The (shift, scale) from reward to score, for `ppo.make_prepare`."""
    return {
        "calibration": tuple(loop["calibration"]),
        "score_stats": ppo.ScoreStats(*loop["score_stats"]),
    }


class TextStream:
    """Rows of text for every update; the position is in `loop`, so that a run resumes exactly.

    Args:
      config: the run's config, with `ptx`.
      tok: the policy's tokenizer.
      mesh: the run's mesh.
    """

    def __init__(self, config: PPORun, tok: Any, mesh: Mesh):
        assert config.ptx is not None
        self._batches: Batches[TokenBatch] = section_data(
            sft_batches,
            config.ptx,
            tok,
            chat_template=config.model.chat_template,
            seed=config.run.seed,
            mesh=mesh,
        )[0]
        self._iterator: Iterator[TokenBatch] | None = None

    def join(self, updates: Iterable[RolloutBatch], loop: Loop) -> Iterator[RolloutBatch]:
        """Adds a batch of text to each mini-batch."""
        if self._iterator is None:
            if "ptx" in loop:
                self._batches.set_state(loop["ptx"])
            self._iterator = iter(self._batches)
        for update in updates:
            text = next(self._iterator)
            loop["ptx"] = self._batches.get_state()
            yield update._replace(ptx=text)
