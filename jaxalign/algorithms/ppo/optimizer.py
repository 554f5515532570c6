"""The parameters of a policy and its critic, and one optimizer for both."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxalign.types import Params


def init_params(policy_params: Params, critic_params: Params | None = None) -> Params:
    """The trained parameters of PPO, for `init_state`: `{"policy": …, "critic": …}`."""
    params = {"policy": policy_params}
    return params if critic_params is None else params | {"critic": critic_params}


def make_optimizer(
    policy_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation | None = None,
    *,
    critic_warmup: int = 0,
) -> optax.GradientTransformation:
    """Combines two optimizers: policy and critic have separate rates and gradient clipping.

    Args:
      policy_tx: the policy's optimizer.
      critic_tx: the critic's optimizer; None without a critic.
      critic_warmup: updates in which only the critic learns; neither the policy nor its optimizer's
        state moves.
    """
    if critic_warmup:

        def later(step: Any, **extra: Any) -> Any:
            return step >= critic_warmup

        policy_tx = optax.conditionally_mask(policy_tx, later)
    parts: dict[Any, Any] = {"policy": policy_tx} | (
        {} if critic_tx is None else {"critic": critic_tx}
    )
    return optax.partition(
        parts,
        lambda params: {
            part: jax.tree.map(lambda _, part=part: part, tree) for part, tree in params.items()
        },
    )
