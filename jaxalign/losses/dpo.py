"""Direct preference optimization and its per-pair relatives.

With s = log π(y|x) − log π_ref(y|x) summed over the answer, s_c of the chosen and s_r of the
rejected one, Δ = s_c − s_r, ε = `label_smoothing`, n an answer's length in tokens:

| `loss_type` | loss of a pair | source |
| --- | --- | --- |
| sigmoid | −(1−ε) log σ(βΔ) − ε log σ(−βΔ) | Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; ε > 0: cDPO, Mitchell 2023, "A note on DPO with noisy preferences" |
| hinge | max(0, 1 − βΔ) | Zhao et al. 2023 (SLiC-HF, 2305.10425) in the form of Liu et al. 2023 (RSO, 2309.06657) |
| ipo | (s_c/n_c − s_r/n_r − 1/(2β))² | Azar et al. 2023 (2310.12036), eq. 17, there with Δ: `ipo_normalize=False` |
| robust | [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε) | Chowdhury et al. 2024 (2403.00409) |
| exo_pair | σ(βΔ) [log σ(βΔ) − log(1−ε)] + σ(−βΔ) [log σ(−βΔ) − log ε] | Ji et al. 2024 (EXO, 2402.00856), eq. 16 |
| nca_pair | −log σ(βs_c) − ½ log σ(−βs_c) − ½ log σ(−βs_r) | Chen et al. 2024 (NCA, 2402.05369) |
| bco_pair | −log σ(βs_c) − log σ(−βs_r) | Jung et al. 2024 (BCO, 2404.04656), reward shift 0 |
| sppo_hard | (s_c − 1/(2β))² + (s_r + 1/(2β))² | Wu et al. 2024 (SPPO, 2405.00675), win rates 1 and 0 |
| apo_zero | 1 − σ(βs_c) + σ(βs_r) | D'Oosterlinck et al. 2024 (APO, 2408.06266), eq. 7 |
| apo_down | σ(βs_c) + 1 − σ(βΔ) | the same, eq. 8 |
| discopop | (1−m)(−log σ(βΔ)) + m e^(−βΔ), m = σ(βΔ/0.05) | Lu et al. 2024 (DiscoPOP, 2406.08414), eq. 5 |
| sigmoid_norm | −log σ(β (s_c/n_c − s_r/n_r)) | Lambert et al. 2024 (Tülu 3, 2411.15124) |
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.masked import as_float32
from jaxalign.types import Array

DISCOPOP_TAU = 0.05
"""Temperature of the switch between the two halves of `discopop`, as published."""

_SMOOTHED = ("sigmoid", "robust", "exo_pair")


def preference_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
    ipo_normalize: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of preference pairs from summed log-probabilities.

    ℓ = −log σ(β [(log π(y_c) − log π_ref(y_c)) − (log π(y_r) − log π_ref(y_r))]) by default:
    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. The table at the top of this file has the
    equation and the paper of each `loss_type`.

    Args:
      chosen_logps: log π of the chosen answer in nats, summed over its tokens, `[B]`, or `[B, S]`
        when rows are packed (any shape).
      rejected_logps: the same for the rejected answer; the same shape, as all that follow.
      ref_chosen_logps: log π_ref of the chosen answer.
      ref_rejected_logps: log π_ref of the rejected answer.
      beta: β > 0, how closely the policy is held to the reference.
      loss_type: one of `LOSS_TYPES`.
      label_smoothing: ε in [0, 0.5), the chance that a label is flipped; for `sigmoid`, `robust`
        and `exo_pair` (which needs ε > 0).
      chosen_lengths: tokens of the chosen answer, for `ipo` and `sigmoid_norm`. A fact about the
        batch: it may be passed always, the other types have no use for it.
      rejected_lengths: tokens of the rejected answer.
      ipo_normalize: for `ipo`: True takes log-ratios per token, False summed as published.

    Returns:
      `(losses, chosen_rewards, rejected_rewards)`, float32, the shape of the inputs, not reduced.
      The rewards are the implicit ones, β · (log π − log π_ref), unnormalised for every type.

    Raises:
      ValueError: an unknown `loss_type`, an option out of range or one that this `loss_type` does
        not have, lengths missing, or shapes that differ.

    >>> chosen, rejected = jnp.array([-10.0]), jnp.array([-12.0])
    >>> preference_loss(chosen, rejected, chosen, rejected)[0]  # policy = reference: log 2
    Array([0.6931472], dtype=float32)
    """
    check_options(
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        ipo_normalize=ipo_normalize,
    )
    chosen, rejected, ref_chosen, ref_rejected = as_float32(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    rewards = beta * chosen_ratio, beta * rejected_ratio
    if loss_type == "sigmoid_norm" or (loss_type == "ipo" and ipo_normalize):
        chosen_ratio = _per_token(chosen_ratio, "chosen_lengths", chosen_lengths, loss_type)
        rejected_ratio = _per_token(rejected_ratio, "rejected_lengths", rejected_lengths, loss_type)
    losses = _LOSSES[loss_type](chosen_ratio, rejected_ratio, beta, label_smoothing)
    return losses, *rewards


def check_options(
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    ipo_normalize: bool = True,
) -> None:
    """Refuses options of `preference_loss` that are out of range or would have no effect.

    A config calls this when it is built, before any model is loaded.

    Raises:
      ValueError: which option, what it is, what it may be.
    """
    if loss_type not in _LOSSES:
        raise ValueError(f"loss_type={loss_type!r}: wanted one of {', '.join(LOSS_TYPES)}")
    if not beta > 0:
        raise ValueError(f"beta={beta}: wanted a number > 0; 0.1 is usual")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: wanted 0 ≤ label_smoothing < 0.5")
    if label_smoothing > 0 and loss_type not in _SMOOTHED:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no effect on loss_type={loss_type!r}; set it "
            f"to 0, or use one of {', '.join(_SMOOTHED)}"
        )
    if label_smoothing == 0 and loss_type == "exo_pair":
        raise ValueError(
            "label_smoothing=0 with loss_type='exo_pair': the loss contains log(label_smoothing); "
            "set it above 0, e.g. 1e-3"
        )
    if not ipo_normalize and loss_type != "ipo":
        raise ValueError(
            f"ipo_normalize=False has no effect on loss_type={loss_type!r}; leave it True, or use "
            "loss_type='ipo'"
        )


def _per_token(ratio: jax.Array, name: str, lengths: Array | None, loss_type: str) -> jax.Array:
    if lengths is None:
        hint = "; or ipo_normalize=False for summed log-ratios" if loss_type == "ipo" else ""
        raise ValueError(
            f"loss_type={loss_type!r} takes log-ratios per token and {name} is None; pass the "
            f"number of answer tokens of each pair{hint}"
        )
    ratio, lengths = as_float32(**{"logps": ratio, name: lengths})
    # A slot of a packed row that holds no pair has length 0 and log-ratio 0.
    return ratio / jnp.maximum(lengths, 1.0)


def _sigmoid(chosen: jax.Array, rejected: jax.Array, beta: float, smoothing: float) -> jax.Array:
    logits = beta * (chosen - rejected)
    straight = -(1 - smoothing) * jax.nn.log_sigmoid(logits)
    return straight - smoothing * jax.nn.log_sigmoid(-logits)


def _hinge(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    return jax.nn.relu(1 - beta * (chosen - rejected))


def _ipo(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def _robust(chosen: jax.Array, rejected: jax.Array, beta: float, smoothing: float) -> jax.Array:
    logits = beta * (chosen - rejected)
    straight = -(1 - smoothing) * jax.nn.log_sigmoid(logits)
    return (straight + smoothing * jax.nn.log_sigmoid(-logits)) / (1 - 2 * smoothing)


def _exo_pair(chosen: jax.Array, rejected: jax.Array, beta: float, smoothing: float) -> jax.Array:
    logits = beta * (chosen - rejected)
    wins = jax.nn.log_sigmoid(logits) - math.log1p(-smoothing)
    loses = jax.nn.log_sigmoid(-logits) - math.log(smoothing)
    return jax.nn.sigmoid(logits) * wins + jax.nn.sigmoid(-logits) * loses


def _nca_pair(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    down = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * down


def _bco_pair(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    return -jax.nn.log_sigmoid(beta * chosen) - jax.nn.log_sigmoid(-beta * rejected)


def _sppo_hard(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    target = 1 / (2 * beta)
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def _apo_zero(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def _apo_down(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def _discopop(chosen: jax.Array, rejected: jax.Array, beta: float, _: float) -> jax.Array:
    logits = beta * (chosen - rejected)
    logistic = -jax.nn.sigmoid(-logits / DISCOPOP_TAU) * jax.nn.log_sigmoid(logits)
    # σ(x/τ) e^(−x) in one exponential: for x → −∞ the first factor wins, alone the second is inf.
    return logistic + jnp.exp(jax.nn.log_sigmoid(logits / DISCOPOP_TAU) - logits)


_LOSSES: dict[str, Callable[[jax.Array, jax.Array, float, float], jax.Array]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid,
}

LOSS_TYPES = tuple(_LOSSES)
"""The losses that `preference_loss` knows."""
