"""Experience: from answers and their scores to advantages.

The second half of one PPO iteration. `ppo.prepare` samples and scores (steps 1 and 2). This file
does

    3. log-probabilities of the answers' tokens under policy and reference
    4. KL between the two, one number per token
    5. rewards: −β · KL at every token, the score at the last one
    6. advantages (and returns, with a critic)
    7. the rollout

There are B answers. Rows have T + 1 columns; the last predicts nothing, so the rollout has T.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.ppo.advantages import CRITIC_FREE, Shaped, gae
from jaxalign.algorithms.ppo.config import Config
from jaxalign.algorithms.ppo.packing import (
    RowPlan,
    pack_tokens,
    plan_rows,
    take_planned,
    tokens_and_start,
    unpack,
)
from jaxalign.algorithms.ppo.rows import answer_columns
from jaxalign.algorithms.prepare import Prepare
from jaxalign.losses import advantages as groups
from jaxalign.losses import ppo as losses
from jaxalign.losses.masked import masked_sum, whiten
from jaxalign.models.adapters import without_adapters
from jaxalign.models.backend import backend
from jaxalign.models.base import LanguageModel, ScalarModel, combine, read
from jaxalign.models.lm_head import target_logprobs
from jaxalign.models.lower_states import lower_states, same_lower_layers
from jaxalign.models.ops import take_columns
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import mesh_of, reshard_batch, row_shards, shard_batch, use_mesh
from jaxalign.types import Array, LowerStates, Params, RolloutBatch, TokenBatch, TrainState


class Packed(NamedTuple):
    """A rollout's tokens in fewer rows, and where each position comes from."""

    tokens: TokenBatch
    plan: RowPlan


class Sharing(NamedTuple):
    """Which models have the policy's own lower layers, see `same_lower_layers`."""

    reference: bool = False
    critic: bool = False


APART = Sharing()

ScoreScale = tuple[Array | float, Array | float]
"""(shift, scale): scores become (score − shift) / scale."""


def make_experience(
    model: LanguageModel,
    critic: ScalarModel | None,
    config: Config,
    *,
    reference: LanguageModel | None = None,
) -> Prepare[..., RolloutBatch]:
    """Builds the jitted half of `prepare` after sampling and scoring; takes answers of any origin.

    Args:
      model: the policy.
      critic: value model; None if the advantages need none.
      config: options.
      reference: the model of `ref_params`; None: the policy's. Its parameters may be on other
        devices than the policy's.

    Returns:
      `experience(state, ref_params, tokens, scores, finished, sampler_logprobs=None, kl_coef=None,
      temperature=None, score_scale=None, experts=None) -> RolloutBatch`: `tokens` are prompts with
      their answers `[B, T + 1]` as `join_tokens` makes them, `scores` and `finished` `[B]`,
      `sampler_logprobs` `[B, T + 1]` are aligned with targets; with None nothing is compared with
      the trainer's log-probabilities. `kl_coef` and `temperature` override the configured ones;
      with `score_scale = (shift, scale)` the rewards use (score − shift) / scale. `experts` `[B, T
      + 1, L, k]` are the experts for the policy to use, here and in its updates. The rollout has T
      columns.
    """
    config.check_critic(critic)
    _check_lower_states(model, config)
    reference = model if reference is None else reference

    @jax.jit
    def reference_logprobs(ref_params: Params, tokens: TokenBatch, temperature: Array) -> jax.Array:
        tokens = _without_last_column(tokens)
        return _token_logprobs(reference, on_device(ref_params), tokens, temperature)[0]

    def packed(tokens: TokenBatch, experts: Array | None, mesh: Any) -> Packed | None:
        """The rows in which the models read the rollout; None: its own."""
        if not config.pack_experience or experts is not None:
            return None
        tokens = _without_last_column(tokens)
        there, start = tokens_and_start(tokens, tokens.loss_mask)
        plan = plan_rows(
            there,
            range(len(there)),
            sizes=config.pack_experience,
            multiple=1 if mesh is None else row_shards(mesh),
            samples=config.samples if config.shared_prompts else 1,
            start=start,
        )
        if plan is None:
            return None
        rows = pack_tokens(tokens, plan)
        return Packed(rows if mesh is None else shard_batch(rows, mesh), plan)

    experience = jax.jit(
        functools.partial(_experience, model, critic, reference, config),
        static_argnames="sharing",
    )

    def sharing(state: TrainState, ref_params: Params | None) -> Sharing:
        if not config.keep_lower_states:
            return Sharing()
        _check_frozen(state.params, critic)
        params = combine(state.params, state.frozen)
        others: dict[str, tuple[Any, Any]] = {"reference": (reference, ref_params)}
        if _keeps_critic(critic, config):
            others["critic"] = (critic, params["critic"])
        return Sharing(
            **{
                name: own is not None and same_lower_layers(model, params["policy"], other, own)
                for name, (other, own) in others.items()
            }
        )

    def run(
        state: TrainState,
        ref_params: Params,
        tokens: TokenBatch,
        scores: Array,
        finished: Array,
        sampler_logprobs: Array | None = None,
        kl_coef: Array | None = None,
        temperature: Array | None = None,
        score_scale: ScoreScale | None = None,
        experts: Array | None = None,
    ) -> RolloutBatch:
        mesh, ref_mesh = mesh_of(state.params), mesh_of(ref_params)
        rest = (tokens, scores, finished, sampler_logprobs, kl_coef, temperature, score_scale)
        pack = packed(tokens, experts, mesh)
        columns = None if pack is not None else read_columns(tokens, config)
        if mesh is None or ref_mesh is None or mesh == ref_mesh:
            return experience(
                state, ref_params, *rest, experts=experts, packed=pack, columns=columns,
                sharing=sharing(state, ref_params),
            )  # fmt: skip
        # The reference has its own devices: only tokens and log-probabilities move.
        used = np.asarray(config.temperature if temperature is None else temperature, np.float32)
        with use_mesh(ref_mesh):
            logprobs = reference_logprobs(ref_params, reshard_batch(tokens, ref_mesh), used)
        return experience(
            state, None, *rest, reshard_batch(logprobs, mesh), experts=experts, packed=pack,
            columns=columns,
        )  # fmt: skip

    def lower(
        state: TrainState, ref_params: Params | None, *args: Any, **kwargs: Any
    ) -> jax.stages.Lowered:
        shared = sharing(state, ref_params)
        with use_mesh(mesh_of(state.params)):
            return experience.lower(state, ref_params, *args, sharing=shared, **kwargs)

    return Prepare(run, lower)


def read_columns(tokens: TokenBatch, config: Config) -> jax.Array | None:
    """The columns whose hidden states the models' last layers form, `[B, Q]`; None: all.

    None where that saves nothing (see `Backend.unrolled_layers`), or where an answer, of other
    origin, is longer than `max_new_tokens`.
    """
    mask = _without_last_column(tokens.loss_mask)
    count = num_columns(mask.shape[1], config)
    if count is None:
        return None
    columns, hold_all = answer_columns(mask, count)
    return columns if bool(hold_all) else None


def num_columns(length: int, config: Config) -> int | None:
    """Q of `read_columns` for rows of so many columns; None: all of them."""
    count = config.max_new_tokens + 1
    return count if backend().unrolled_layers and count < length else None


def _experience(
    model: LanguageModel,
    critic: ScalarModel | None,
    reference: LanguageModel,
    config: Config,
    state: TrainState,
    ref_params: Params | None,
    tokens: TokenBatch,
    scores: Array,
    finished: Array,
    sampler_logprobs: Array | None = None,
    kl_coef: Array | None = None,
    temperature: Array | None = None,
    score_scale: ScoreScale | None = None,
    ref_logprobs: Array | None = None,
    experts: Array | None = None,
    packed: Packed | None = None,
    columns: Array | None = None,
    *,
    sharing: Sharing = APART,
) -> RolloutBatch:
    """Steps 3 to 7 as one program; see `make_experience` for the arguments.

    `ref_logprobs` `[B, T]` replace `ref_params` if the reference has its own devices. The models
    read the rows of `packed`, if given, and form the hidden states of `columns`. If
    lower states are kept, models take those of the policy as `sharing` says.
    """
    tokens, sampler_logprobs, experts = _without_last_column((tokens, sampler_logprobs, experts))
    replayed = tokens if experts is None else tokens._replace(experts=experts)
    params = combine(state.params, state.frozen)
    mask = tokens.loss_mask  # [B, T]
    valid = jnp.any(mask, axis=1)  # [B]
    used_temperature = config.temperature if temperature is None else temperature
    coef = config.kl_coef if kl_coef is None else kl_coef

    def unpacked(x: jax.Array) -> jax.Array:
        if columns is not None:
            row = jnp.arange(mask.shape[0])[:, None]
            return jnp.zeros(mask.shape, x.dtype).at[row, columns].set(x)
        return x if packed is None else unpack(x, packed.plan, mask.shape)

    # 3. Log-probabilities, [B, T].
    lower = critic_lower = None  # [B, T, D]
    if config.keep_lower_states:
        lower = lower_states(model, params["policy"], tokens)
        if sharing.critic and lower is not None:
            critic_lower = LowerStates(None, lower.layers)
        elif _keeps_critic(critic, config):
            critic_lower = lower_states(critic, params["critic"], tokens)
    read_rows = _rows(replayed, lower, packed)  # [B, T] or [rows, length]
    ref_rows = _rows(tokens, lower if sharing.reference else None, packed)
    logprobs, hidden = _token_logprobs(
        model, params["policy"], read_rows, used_temperature, columns
    )
    old_logprobs = unpacked(logprobs)
    if ref_logprobs is None:
        own = on_device(ref_params or {})
        logprobs, _ = _token_logprobs(reference, own, ref_rows, used_temperature, columns)
        ref_logprobs = unpacked(logprobs)

    # 4. KL, [B, T].
    token_kl = losses.kl(old_logprobs, ref_logprobs, config.kl_estimator)

    # 5. Rewards, [B, T]; `value_mask` has one more position if the score follows the answer.
    scores = losses.missing_eos_penalty(scores, finished, config.missing_eos_penalty)  # [B]
    scaled = scale_scores(scores, score_scale, config.reward_clip)

    def shape(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        beta = coef if config.kl_in == "reward" else 0.0
        return losses.token_rewards(token_kl, scores, mask, kl_coef=beta, score_at=config.score_at)

    rewards, value_mask = shape(scaled)
    # Not computed as rewards minus scores: a difference of 0.001 between numbers near 1 loses
    # digits.
    non_score = (coef if config.kl_in == "reward" else 0.0) * -masked_sum(token_kl, mask, axis=1)
    trained = _trained_tokens(mask, valid, scores, finished, config)

    # 6. Advantages, [B, T], and returns if there is a critic.
    shaped = Shaped(rewards, value_mask, mask, valid, scaled, lambda scores: shape(scores)[0])
    values = returns = None
    if critic is None:
        advantages = CRITIC_FREE[config.advantage_estimator](shaped, config)
    else:
        if not config.shared_critic:
            value_rows = _rows(tokens, lower if sharing.critic else critic_lower, packed)
            hidden, _ = read(critic, params["critic"], value_rows, columns)
        values = unpacked(critic.scores(params["critic"], hidden))
        advantages, returns = gae(shaped, values, config)
    if config.whitens:
        advantages = whiten(advantages, trained, ddof=config.whiten_ddof)

    # 7. The rollout. The critic is trained wherever the policy is, and one position after.
    def rows(x: Array | None) -> jax.Array | None:
        return None if x is None else jnp.full(valid.shape, x, jnp.float32)

    return RolloutBatch(
        tokens=replayed._replace(loss_mask=trained, lower=lower),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        old_values=None if values is None else jnp.where(value_mask, values, 0.0),
        advantages=jnp.where(trained, advantages, 0.0),
        returns=returns,
        value_mask=value_mask & jnp.any(trained, axis=1, keepdims=True),
        rewards=rewards,
        scores=scores,
        sampler_logprobs=sampler_logprobs,
        finished=finished,
        valid=valid,
        answer_mask=mask if config.mask_truncated or config.skip_equal_groups else None,
        scaled_scores=None if scaled is scores else scaled,
        temperature=rows(temperature),
        kl_coef=rows(kl_coef) if config.kl_in == "loss" else None,
        non_score_rewards=non_score,
        columns=columns,
        critic_lower=critic_lower,
    )


def _check_lower_states(model: LanguageModel, config: Config) -> None:
    if config.keep_lower_states and not getattr(model, "frozen_layers", 0):
        raise ValueError(
            "ppo keep_lower_states=True: training changes every layer of the policy, so none can "
            "be kept; wanted adapters in the upper layers alone (model.lora.targets such as "
            r"['layers\.(1[2-9]|2\d)\..*']), or keep_lower_states: false"
        )


def _keeps_critic(critic: ScalarModel | None, config: Config) -> bool:
    """Whether the critic has lower layers, apart from the policy's passes, that are kept."""
    return not config.shared_critic and getattr(critic, "frozen_layers", 0) > 0


def _check_frozen(params: Params, critic: ScalarModel | None) -> None:
    """Raises ValueError if the layers below the adapters are trained."""
    for part, trained in params.items():
        adapted = part == "policy" or getattr(critic, "frozen_layers", 0)
        if adapted and {"embed", "blocks"} & set(without_adapters(trained)):
            raise ValueError(
                f"ppo keep_lower_states=True: state.params[{part!r}] holds embed or blocks of the "
                "base, which would stay as they are; wanted adapters alone, and the base in "
                "state.frozen, or keep_lower_states=False"
            )


def _rows(tokens: TokenBatch, lower: LowerStates | None, packed: Packed | None) -> TokenBatch:
    """The rows that a model reads: the rollout's or packed ones, with its lower states."""
    if packed is None:
        return tokens._replace(lower=lower)
    return packed.tokens._replace(lower=take_planned(lower, packed.plan))


def scale_scores(
    scores: jax.Array, score_scale: ScoreScale | None, clip: float | None
) -> jax.Array:
    """(score − shift) / scale, then clipped to ± `clip`; each step is optional."""
    if score_scale is not None:
        scores = (scores - score_scale[0]) / score_scale[1]
    return scores if clip is None else jnp.clip(scores, -clip, clip)


def _token_logprobs(
    model: LanguageModel, params: Params, tokens: TokenBatch, temperature: Array | float,
    columns: Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(log π of the answers' tokens `[B, T]`, 0 elsewhere; hidden states `[B, T, D]`).

    With `columns` `[B, Q]` the results are of those columns.
    """
    hidden, _ = read(model, params, tokens, columns)
    mask, targets = tokens.loss_mask, tokens.targets
    if columns is not None:
        mask, targets = (take_columns(jnp.asarray(x), columns) for x in (mask, targets))
    # With entropies, like the policy's loss: the same sums give the same bits, so that the first
    # ratio π/π_old is 1, and the first KL 0.
    logprobs, _ = target_logprobs(
        model, params, hidden, targets, temperature,
        entropy=True, entropy_gradient=False, mask=mask,
    )  # fmt: skip
    return jnp.where(mask, logprobs, 0.0), hidden


def _trained_tokens(
    mask: jax.Array, valid: jax.Array, scores: jax.Array, finished: Array, config: Config
) -> jax.Array:
    """The tokens in the loss, `[B, T]`. Filtered answers still count in their group's baseline."""
    if config.mask_truncated:
        mask &= jnp.asarray(finished, bool)[:, None]
    if config.skip_equal_groups:
        mask &= ~groups.equal_groups(scores, valid, config.samples)[:, None]
    return mask


def _without_last_column(tree: Any) -> Any:
    """`[B, T + 1]` → `[B, T]`."""
    return jax.tree.map(lambda x: x[:, :-1], tree)
