"""Proximal policy optimisation against a reward, with a KL penalty; with a critic or without.

    r_t = score·[t = last] − β · kl_t                                  shaped reward of a token
    A_t = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V_{t+1} − V_t             advantage
    L   = E[max(−A ρ, −A clip(ρ, 1−ε, 1+ε))] + c_v · ½ E[max((V−R)², (clip(V)−R)²)]

with ρ_t = π(y_t|·)/π_old(y_t|·) (Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for
language models: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Huang et al. 2024,
https://arxiv.org/abs/2403.17031). Four models: policy and critic are trained; the frozen reference
and the reward run only in `prepare`, which samples answers, scores them and computes advantages,
once per iteration. `minibatches` then splits the rollout for several epochs of steps.

Its relatives differ in how they estimate A and average over tokens: RLOO, GRPO, Dr. GRPO, DAPO,
REINFORCE++ and GSPO compare the `samples` answers to a prompt instead of using a critic
(`losses.advantages`, `losses.aggregate`; recipes in docs/ppo.md). Pass `critic=None` for them.

One iteration, file by file:

| file | what it does |
| --- | --- |
| `config` | options, and which go together |
| `prepare` | samples answers, scores them |
| `experience` | log-probabilities, KL, rewards, `advantages`, rollout |
| `loss` | policy, critic, text |
| `minibatch` | mini-batches, their rows packed by `packing`; `make_step` below updates on each |

Beside them: `figures` describe a rollout, `controllers` adapt β and score statistics from one
iteration to the next, `dynamic_sampling` replaces groups without a signal, `optimizer` combines the
policy's and the critic's optimizers, `rows` has the masks.

State: `TrainState` with `params = {"policy": …, "critic": …}`, or the policy alone. Batch:
`RolloutBatch`, `[B, T]`.
"""

from __future__ import annotations

import optax

# In reading order.
# isort: off
from jaxalign.algorithms.ppo.config import Config
from jaxalign.algorithms.ppo.prepare import CALIBRATIONS, RewardFn, calibrate, make_prepare
from jaxalign.algorithms.ppo.experience import make_experience
from jaxalign.algorithms.ppo.loss import make_loss
from jaxalign.algorithms.ppo.minibatch import minibatches

# isort: on
from jaxalign.algorithms.ppo.controllers import ScoreStats, next_kl_coef, next_score_stats
from jaxalign.algorithms.ppo.dynamic_sampling import count_equal_groups, fill_equal_groups
from jaxalign.algorithms.ppo.figures import rollout_figures, rollout_metrics
from jaxalign.algorithms.ppo.optimizer import init_params, make_optimizer
from jaxalign.algorithms.ppo.rows import join_tokens
from jaxalign.algorithms.step import Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.models.base import LanguageModel, ScalarModel

__all__ = [
    "CALIBRATIONS",
    "Config",
    "RewardFn",
    "ScoreStats",
    "calibrate",
    "count_equal_groups",
    "fill_equal_groups",
    "init_params",
    "join_tokens",
    "make_experience",
    "make_loss",
    "make_optimizer",
    "make_prepare",
    "make_step",
    "minibatches",
    "next_kl_coef",
    "next_score_stats",
    "rollout_figures",
    "rollout_metrics",
]


def make_step(
    model: LanguageModel,
    critic: ScalarModel | None,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
) -> Step:
    """`step(state, batch: RolloutBatch) -> (state, metrics)`; see `algorithms.step.make_step`.

    Also logs `grad_norm/policy` and `grad_norm/critic`, where there is a critic.
    """
    parts = () if critic is None else ("policy", "critic")
    return _make_step(make_loss(model, critic, config), tx, micro_batches, parts=parts)
