"""Direct preference optimization and its relatives: one function for all of them.

`losses.preference` has the table: the equation, the paper and the options of each `loss_type`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.losses import preference
from jaxalign.losses.divergence import check_divergence, divergence_score
from jaxalign.losses.masked import as_bool, as_float32
from jaxalign.losses.preference import Pairs
from jaxalign.losses.ranges import outside
from jaxalign.types import Array

LOSS_TYPES = tuple(preference.TABLE)
"""The built-in losses; `losses.preference.register` adds others."""

REFERENCE_FREE = tuple(name for name, row in preference.TABLE.items() if row.own_rewards)
"""Losses that look at the policy alone."""

WHOLE_BATCH = tuple(name for name, row in preference.TABLE.items() if row.whole_batch)
"""Losses that compare all pairs of a batch, so that it cannot be split into micro-batches."""


def preference_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None = None,
    ref_rejected_logps: Array | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ipo_normalize: bool = True,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    reward_shift: float | Array = 0.0,
    chosen_sft_logps: Array | None = None,
    pair_weights: Array | None = None,
    mask: Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of preference pairs from summed log-probabilities.

        ℓ = −log σ(β [(log π(y_c) − log π_ref(y_c)) − (log π(y_r) − log π_ref(y_r))])

    by default: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. `losses.preference` has the equation
    and the paper of each `loss_type`.

    Args:
      chosen_logps: log π of the chosen answer in nats, summed over its tokens, `[B]`, or `[B, S]`
        when rows are packed (any shape).
      rejected_logps: the same for the rejected answer. All arrays below have the same shape too.
      ref_chosen_logps: log π_ref of the chosen answer; None for the types in `REFERENCE_FREE`,
        which do not read it.
      ref_rejected_logps: log π_ref of the rejected answer.
      beta: β > 0, how closely the policy is held to the reference.
      loss_type: one of `LOSS_TYPES`, or several; the loss is then their weighted sum.
      loss_weights: one weight per loss type, if there are several; None: 1 each.
      label_smoothing: ε in [0, 0.5), the chance that a label is flipped; for `sigmoid`, `robust`,
        `exo_pair` (which needs ε > 0), `aot`, `aot_unpaired`, `simpo` and `cpo`.
      chosen_lengths: tokens of the chosen answer, for `ipo`, `sigmoid_norm`, `sft`, `simpo` and
        `orpo`. It describes the batch, so you may always pass it.
      rejected_lengths: tokens of the rejected answer.
      f_divergence: the divergence that holds the policy to the reference, see `losses.divergence`;
        only for losses on the difference of scores: `sigmoid`, `sigmoid_norm`, `hinge`, `ipo`,
        `exo_pair`, `robust`, `discopop` (and `sft` beside them).
      f_alpha: α of `f_divergence="alpha_divergence"`.
      ipo_normalize: `ipo`: True takes log-ratios per token, False summed as published.
      discopop_tau: `discopop`: τ > 0, temperature of the switch between its halves.
      simpo_gamma: `simpo`: the margin γ ≥ 0.
      reward_shift: `bco_pair`: δ, the reward that counts as neutral, a number or an array of the
        pairs' shape. TRL uses 0; the paper uses a running mean of both answers' rewards β · s.
      chosen_sft_logps: `sft`: log π of the chosen answers, where `chosen_logps` is not the plain
        sum (`ld_alpha`).
      pair_weights: a factor for each pair's loss (WPO: `losses.tokens.wpo_weight` of the chosen
        answer times that of the rejected one); None for 1. Not for the `aot` types, which mix
        pairs.
      mask: which pairs exist, for `aot`, `aot_unpaired` and `sft`, which look at all pairs
        together; None: all exist. It describes the batch, so you may always pass it.
      **options: options of a loss that `losses.preference.register` added.

    Returns:
      `(losses, chosen_rewards, rejected_rewards)`, float32, the shape of the inputs, not reduced.
      The rewards are the implicit ones, β · (log π − log π_ref), unnormalised for every type and
      divergence. Losses without a reference return the rewards of `losses.reference_free`. `aot`
      types: a pair's loss compares its u (or s_c) with the l (or s_r) of the same rank. `sft`: the
      same number at every pair, so that the mean over pairs is the mean over tokens.

    Raises:
      ValueError: an unknown `loss_type` or option, an option that is out of range or does not
        belong to this `loss_type`, missing lengths or reference, or shapes that differ. The range
        of an option is not checked while `jit` or `vmap` traces it.

    >>> chosen, rejected = jnp.array([-10.0]), jnp.array([-12.0])
    >>> preference_loss(chosen, rejected, chosen, rejected)[0]  # policy = reference: log 2
    Array([0.6931472], dtype=float32)
    >>> two = ("sigmoid", "sft")
    >>> n = jnp.array([5.0])
    >>> preference_loss(chosen, rejected, chosen, rejected, loss_type=two, chosen_lengths=n)[0]
    Array([2.6931472], dtype=float32)
    """
    options = {
        "label_smoothing": label_smoothing,
        "ipo_normalize": ipo_normalize,
        "discopop_tau": discopop_tau,
        "simpo_gamma": simpo_gamma,
        "reward_shift": reward_shift,
        "chosen_sft_logps": chosen_sft_logps,
        **options,
    }
    check_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        **options,
    )
    types = as_types(loss_type)
    if pair_weights is not None and needs_whole_batch(types):
        raise ValueError(
            f"pair_weights with loss_type={loss_type!r}: its losses mix pairs; leave them out"
        )
    pairs = _pairs(
        (chosen_logps, rejected_logps),
        (ref_chosen_logps, ref_rejected_logps),
        (chosen_lengths, rejected_lengths),
        mask,
        (f_divergence, f_alpha),
        loss_type,
    )
    rewards = [beta * ratio for ratio in pairs.ratios or ()]
    total = jnp.zeros(pairs.mask.shape)
    for name, weight in zip(types, as_weights(types, loss_weights), strict=True):
        row = preference.TABLE[name]
        losses = row.loss(pairs, beta=beta, **row.own(options))
        if row.own_rewards:
            losses, *rewards = losses
        if pair_weights is not None:
            losses, factor = as_float32(losses=losses, pair_weights=pair_weights)
            losses = losses * factor
        total = total + weight * losses
    return total, rewards[0], rewards[1]


def as_types(loss_type: str | Sequence[str]) -> tuple[str, ...]:
    """One or several loss types as a tuple."""
    return (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)


def as_weights(
    types: Sequence[str], loss_weights: Sequence[float] | None = None
) -> tuple[float, ...]:
    """The weight of each loss type."""
    return (1.0,) * len(types) if loss_weights is None else tuple(loss_weights)


def needs_reference(loss_type: str | Sequence[str]) -> bool:
    """Whether the reference's log-probabilities enter the loss or its rewards."""
    return not any(preference.TABLE[name].own_rewards for name in as_types(loss_type))


def needs_whole_batch(loss_type: str | Sequence[str]) -> bool:
    """Whether the loss compares all pairs of a batch, so that the batch cannot be split."""
    return any(preference.TABLE[name].whole_batch for name in as_types(loss_type))


def check_options(
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    **options: Any,
) -> None:
    """Raises ValueError for options of `preference_loss` that are out of range or have no effect.

    A config calls this when it is built, before any model is loaded.

    Raises:
      ValueError: which option, what it is, what it may be.
    """
    types = as_types(loss_type)
    for name in types or ("",):
        if name not in preference.TABLE:
            known = ", ".join(preference.TABLE)
            raise ValueError(f"loss_type={name!r}: wanted one of {known}")
    _check_combination(types, loss_weights)
    if outside(beta, lambda x: x > 0):
        raise ValueError(f"beta={beta}: wanted a number > 0; 0.1 is usual")
    shown = repr(types[0] if len(types) == 1 else types)
    for name, value in options.items():
        _check_option(name, value, types, shown)
    for name in types:
        row = preference.TABLE[name]
        if row.check is not None:
            row.check(**row.own(options))
    check_divergence(f_divergence, f_alpha)
    of_difference = [name for name, row in preference.TABLE.items() if row.difference]
    if f_divergence != "reverse_kl" and not (
        set(types) & set(of_difference) and set(types) <= {*of_difference, "sft"}
    ):
        raise ValueError(
            f"f_divergence={f_divergence!r} with loss_type={shown}: it is defined for losses of a "
            f"difference of scores only: {', '.join(of_difference)}; use reverse_kl"
        )


def _check_option(name: str, value: Any, types: tuple[str, ...], shown: str) -> None:
    """Raises ValueError for an option that is unknown, out of range, or without effect here."""
    users = [user for user, row in preference.TABLE.items() if name in row.options]
    if not users:
        names = preference.option_names()
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{name}={value!r}: no preference loss has this option; {hint}wanted one of "
            f"{', '.join(names)}"
        )
    takers = [user for user in users if user in types]
    for user in takers or users[:1]:
        option = preference.TABLE[user].options[name]
        if option.valid is not None and outside(value, option.valid):
            raise ValueError(f"{name}={value}: wanted {option.wanted}")
    default = preference.TABLE[users[0]].options[name].default
    if not takers and _is_set(value, default):
        raise ValueError(
            f"{name}={value} has no effect on loss_type={shown}; leave it {default}, or use "
            f"{'one of ' if len(users) > 1 else ''}{', '.join(users)}"
        )


def _is_set(value: Any, default: Any) -> bool:
    """Whether an option, which may be an array, differs from its default."""
    return value != default if isinstance(value, bool | int | float | str) else value is not default


def _check_combination(types: tuple[str, ...], loss_weights: Sequence[float] | None) -> None:
    if len(set(types)) < len(types):
        raise ValueError(f"loss_type={types}: each type once; say how much in loss_weights")
    if not needs_reference(types) and len(set(types) - {"sft"}) > 1:
        raise ValueError(
            f"loss_type={types}: {', '.join(REFERENCE_FREE)} have rewards of their own; each goes "
            "alone or with sft"
        )
    if loss_weights is None:
        return
    if len(loss_weights) != len(types):
        raise ValueError(
            f"loss_weights={tuple(loss_weights)}: wanted one number for each loss_type {types}"
        )
    if any(outside(weight, lambda x: x > 0) for weight in loss_weights):
        raise ValueError(f"loss_weights={tuple(loss_weights)}: wanted numbers > 0")


def _pairs(
    logps: tuple[Array, Array],
    ref_logps: tuple[Array | None, Array | None],
    lengths: tuple[Array | None, Array | None],
    mask: Array | None,
    divergence: tuple[str, float],
    loss_type: str | Sequence[str],
) -> Pairs:
    """The batch as losses read it: float32, shapes checked, scores computed."""
    chosen, rejected = as_float32(chosen_logps=logps[0], rejected_logps=logps[1])
    mask = jnp.ones(chosen.shape, bool) if mask is None else as_bool(mask)
    if not needs_reference(loss_type):
        return Pairs((chosen, rejected), None, None, None, lengths, mask)
    if ref_logps[0] is None or ref_logps[1] is None:
        raise ValueError(
            f"loss_type={loss_type!r} compares with a reference, and ref_chosen_logps or "
            f"ref_rejected_logps is None; pass both, or use one of {', '.join(REFERENCE_FREE)}"
        )
    _, ref_chosen, ref_rejected = as_float32(
        chosen_logps=chosen, ref_chosen_logps=ref_logps[0], ref_rejected_logps=ref_logps[1]
    )
    ratios = chosen - ref_chosen, rejected - ref_rejected
    s_chosen, s_rejected = (divergence_score(ratio, *divergence) for ratio in ratios)
    return Pairs(
        (chosen, rejected),
        (ref_chosen, ref_rejected),
        ratios,
        (s_chosen, s_rejected),
        lengths,
        mask,
    )
