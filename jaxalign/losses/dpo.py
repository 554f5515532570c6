"""Direct preference optimization and its relatives: one function for all of them.

With s = log π(y|x) − log π_ref(y|x) summed over the answer (or what an f-divergence makes of it),
s_c of the chosen and s_r of the rejected one, Δ = s_c − s_r, ε = `label_smoothing`, n an answer's
length in tokens, (k) the k-th smallest of the batch:

| `loss_type` | loss of a pair | source |
| --- | --- | --- |
| sigmoid | −(1−ε) log σ(βΔ) − ε log σ(−βΔ) | Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; ε > 0: cDPO, Mitchell 2023, "A note on DPO with noisy preferences" |
| hinge | max(0, 1 − βΔ) | Zhao et al. 2023 (SLiC-HF, 2305.10425) in the form of Liu et al. 2023 (RSO, 2309.06657) |
| ipo | (s_c/n_c − s_r/n_r − 1/(2β))² | Azar et al. 2023 (2310.12036), eq. 17, there with Δ: `ipo_normalize=False` |
| robust | [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε) | Chowdhury et al. 2024 (2403.00409) |
| exo_pair | σ(βΔ) [log σ(βΔ) − log(1−ε)] + σ(−βΔ) [log σ(−βΔ) − log ε] | Ji et al. 2024 (EXO, 2402.00856), eq. 16 |
| nca_pair | −log σ(βs_c) − ½ log σ(−βs_c) − ½ log σ(−βs_r) | Chen et al. 2024 (NCA, 2402.05369) |
| bco_pair | −log σ(βs_c − δ) − log σ(−(βs_r − δ)) | Jung et al. 2024 (BCO, 2404.04656); δ = `reward_shift` |
| sppo_hard | (s_c − 1/(2β))² + (s_r + 1/(2β))² | Wu et al. 2024 (SPPO, 2405.00675), eq. 4.7, win rates 1 and 0 |
| aot | sigmoid of u₍ₖ₎ − l₍ₖ₎, u = log π(y_c) − log π(y_r), l the same of π_ref | Melnyk et al. 2024 (AOT, 2406.05882), paired |
| aot_unpaired | sigmoid of s_c₍ₖ₎ − s_r₍ₖ₎ | the same, unpaired |
| apo_zero | 1 − σ(βs_c) + σ(βs_r) | D'Oosterlinck et al. 2024 (APO, 2408.06266), eq. 7 |
| apo_down | σ(βs_c) + 1 − σ(βΔ) | the same, eq. 8 |
| discopop | (1−m)(−log σ(βΔ)) + m e^(−βΔ), m = σ(βΔ/τ) | Lu et al. 2024 (DiscoPOP, 2406.08414), eq. 5 |
| sft | −Σ log π(y_c) / Σ n_c, over the batch | Ouyang et al. 2022 (2203.02155), beside DPO as in Pang et al. 2024 (iterative RPO, 2404.19733) |
| sigmoid_norm | −log σ(β (s_c/n_c − s_r/n_r)) | Lambert et al. 2024 (Tülu 3, 2411.15124) |
| simpo, orpo, cpo | without a reference | `losses.reference_free` |

The formulas themselves are in `losses.forms` and `losses.reference_free`.
"""  # noqa: E501

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.losses import forms, reference_free
from jaxalign.losses.divergence import check_divergence, divergence_score
from jaxalign.losses.masked import as_bool, as_float32, keep
from jaxalign.types import Array

_FORMS: dict[str, Callable[..., jax.Array]] = {
    "sigmoid": forms.sigmoid,
    "hinge": forms.hinge,
    "ipo": forms.ipo,
    "robust": forms.robust,
    "exo_pair": forms.exo_pair,
    "nca_pair": forms.nca_pair,
    "bco_pair": forms.bco_pair,
    "sppo_hard": forms.sppo_hard,
    "apo_zero": forms.apo_zero,
    "apo_down": forms.apo_down,
    "discopop": forms.discopop,
    "sigmoid_norm": forms.sigmoid,
}

REFERENCE_FREE = ("simpo", "orpo", "cpo")
"""Losses that look at the policy alone."""

WHOLE_BATCH = ("aot", "aot_unpaired")
"""Losses of which each looks at all pairs of a batch, so that the batch cannot be cut."""

LOSS_TYPES = (*_FORMS, *WHOLE_BATCH, "sft", *REFERENCE_FREE)
"""The losses that `preference_loss` knows."""

_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
# Elsewhere the common part of the scores, β log Z(x), would not cancel.
_OF_A_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


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
    ipo_normalize: bool = True,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    reward_shift: Array | float = 0.0,
    pair_weights: Array | None = None,
    chosen_sft_logps: Array | None = None,
    mask: Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of preference pairs from summed log-probabilities.

    ℓ = −log σ(β [(log π(y_c) − log π_ref(y_c)) − (log π(y_r) − log π_ref(y_r))]) by default:
    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. The table at the top of this file has the
    equation and the paper of each `loss_type`.

    Args:
      chosen_logps: log π of the chosen answer in nats, summed over its tokens, `[B]`, or `[B, S]`
        when rows are packed (any shape).
      rejected_logps: the same for the rejected answer; the same shape, as all arrays that follow.
      ref_chosen_logps: log π_ref of the chosen answer; None for the types in `REFERENCE_FREE`,
        which do not look at it.
      ref_rejected_logps: log π_ref of the rejected answer.
      beta: β > 0, how closely the policy is held to the reference.
      loss_type: one of `LOSS_TYPES`, or several, whose weighted sum is the loss.
      loss_weights: the weight of each of several types; None: 1 each.
      label_smoothing: ε in [0, 0.5), the chance that a label is flipped; for `sigmoid`, `robust`,
        `exo_pair` (which needs ε > 0), `aot`, `aot_unpaired`, `simpo` and `cpo`.
      chosen_lengths: tokens of the chosen answer, for `ipo`, `sigmoid_norm`, `sft`, `simpo` and
        `orpo`. A fact about the batch: it may be passed always.
      rejected_lengths: tokens of the rejected answer.
      ipo_normalize: for `ipo`: True takes log-ratios per token, False summed as published.
      f_divergence: what holds the policy to the reference, see `losses.divergence`; for losses of
        a difference: `sigmoid`, `sigmoid_norm`, `hinge`, `ipo`, `exo_pair`, `robust`, `discopop`
        (and `sft` beside them).
      f_alpha: α of `f_divergence="alpha_divergence"`.
      discopop_tau: for `discopop`: τ > 0, temperature of the switch between its halves.
      simpo_gamma: for `simpo`: the margin γ ≥ 0.
      reward_shift: for `bco_pair`: δ, what counts as no reward, a number or an array of the pairs'
        shape. 0 is TRL's; the paper's is a running mean of both answers' rewards β · s.
      pair_weights: factor of each pair's loss (WPO: `losses.tokens.wpo_weight` of the chosen times
        that of the rejected); None for 1. Not for `aot` types, which mix pairs.
      chosen_sft_logps: for `sft`, where `chosen_logps` is not the plain sum (`ld_alpha`).
      mask: which pairs exist, for `aot`, `aot_unpaired` and `sft`, which look at all of them
        together; None: all. A fact about the batch: it may be passed always.

    Returns:
      `(losses, chosen_rewards, rejected_rewards)`, float32, the shape of the inputs, not reduced.
      The rewards are the implicit ones, β · (log π − log π_ref), unnormalised for every type and
      divergence; without a reference those of `losses.reference_free`. `aot` types: the loss at a
      pair is that of its u (or s_c) with the l (or s_r) of the same rank. `sft`: the same number
      at every pair, so that the mean over pairs is the mean over tokens.

    Raises:
      ValueError: an unknown `loss_type`, an option out of range or one that this `loss_type` does
        not have, lengths or reference missing, or shapes that differ.

    >>> chosen, rejected = jnp.array([-10.0]), jnp.array([-12.0])
    >>> preference_loss(chosen, rejected, chosen, rejected)[0]  # policy = reference: log 2
    Array([0.6931472], dtype=float32)
    >>> two = ("sigmoid", "sft")
    >>> n = jnp.array([5.0])
    >>> preference_loss(chosen, rejected, chosen, rejected, loss_type=two, chosen_lengths=n)[0]
    Array([2.6931472], dtype=float32)
    """
    check_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        ipo_normalize=ipo_normalize,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
    )
    types = as_types(loss_type)
    if pair_weights is not None and set(types) & set(WHOLE_BATCH):
        raise ValueError(
            f"pair_weights with loss_type={loss_type!r}: its losses mix pairs; leave them out"
        )
    chosen, rejected = as_float32(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    mask = jnp.ones(chosen.shape, bool) if mask is None else as_bool(mask)

    def sft() -> jax.Array:
        logps = chosen if chosen_sft_logps is None else chosen_sft_logps
        total = jnp.sum(keep(logps, mask))
        tokens = jnp.sum(keep(_needed("chosen_lengths", chosen_lengths, "sft"), mask))
        return jnp.full(chosen.shape, -total / jnp.maximum(tokens, 1.0))

    losses: dict[str, Callable[[], jax.Array]] = {"sft": sft}
    if needs_reference(types):
        if ref_chosen_logps is None or ref_rejected_logps is None:
            raise ValueError(
                f"loss_type={loss_type!r} compares with a reference, and ref_chosen_logps or "
                f"ref_rejected_logps is None; pass both, or use one of {', '.join(REFERENCE_FREE)}"
            )
        _, ref_chosen, ref_rejected = as_float32(
            chosen_logps=chosen, ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
        )  # fmt: skip
        ratios = chosen - ref_chosen, rejected - ref_rejected
        rewards = beta * ratios[0], beta * ratios[1]
        scores = tuple(divergence_score(ratio, f_divergence, f_alpha) for ratio in ratios)
        options: dict[str, Any] = {
            "beta": beta,
            "smoothing": label_smoothing,
            "discopop_tau": discopop_tau,
            "reward_shift": reward_shift,
        }

        def form(name: str) -> jax.Array:
            if name == "aot":
                upper, lower = chosen - rejected, ref_chosen - ref_rejected
                return forms.transport(upper, lower, **options, mask=mask)
            if name == "aot_unpaired":
                return forms.transport(*ratios, **options, mask=mask)
            pair = scores
            if name == "sigmoid_norm" or (name == "ipo" and ipo_normalize):
                pair = tuple(
                    # A slot of a packed row that holds no pair has length 0 and log-ratio 0.
                    score / jnp.maximum(_needed(side, lengths[side], name, score), 1.0)
                    for side, score in zip(lengths, scores, strict=True)
                )
            return _FORMS[name](*pair, **options)

        losses |= {name: functools.partial(form, name) for name in types if name != "sft"}
    else:
        (free,) = set(types) & set(REFERENCE_FREE)
        options = {"beta": beta}
        if free in ("simpo", "orpo"):
            options |= {side: _needed(side, n, free, chosen) for side, n in lengths.items()}
        if free in ("simpo", "cpo"):
            options["label_smoothing"] = label_smoothing
        if free == "simpo":
            options["simpo_gamma"] = simpo_gamma
        alone, *rewards = getattr(reference_free, free)(chosen, rejected, **options)
        losses[free] = lambda: alone

    total = jnp.zeros(chosen.shape)
    for name, weight in zip(types, as_weights(types, loss_weights), strict=True):
        loss = losses[name]()
        if pair_weights is not None:
            loss, factor = as_float32(losses=loss, pair_weights=pair_weights)
            loss = loss * factor
        total = total + weight * loss
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
    return not set(as_types(loss_type)) & set(REFERENCE_FREE)


def check_options(
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    ipo_normalize: bool = True,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
) -> None:
    """Refuses options of `preference_loss` that are out of range or would have no effect.

    A config calls this when it is built, before any model is loaded.

    Raises:
      ValueError: which option, what it is, what it may be.
    """
    types = as_types(loss_type)
    for name in types or ("",):
        if name not in LOSS_TYPES:
            raise ValueError(f"loss_type={name!r}: wanted one of {', '.join(LOSS_TYPES)}")
    _check_combination(types, loss_weights)
    if not beta > 0:
        raise ValueError(f"beta={beta}: wanted a number > 0; 0.1 is usual")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: wanted 0 ≤ label_smoothing < 0.5")
    if label_smoothing == 0 and "exo_pair" in types:
        raise ValueError(
            "label_smoothing=0 with loss_type='exo_pair': the loss contains log(label_smoothing); "
            "set it above 0, e.g. 1e-3"
        )
    if not discopop_tau > 0:
        raise ValueError(f"discopop_tau={discopop_tau}: wanted a number > 0; 0.05 is published")
    if not 0 <= simpo_gamma < math.inf:
        raise ValueError(f"simpo_gamma={simpo_gamma}: wanted a number ≥ 0; 0.5 is usual")
    shown = repr(types[0] if len(types) == 1 else types)
    for name, value, unset, users in (
        ("label_smoothing", label_smoothing, 0.0, _SMOOTHED),
        ("ipo_normalize", ipo_normalize, True, ("ipo",)),
        ("discopop_tau", discopop_tau, 0.05, ("discopop",)),
        ("simpo_gamma", simpo_gamma, 0.5, ("simpo",)),
    ):
        if value != unset and not set(types) & set(users):
            raise ValueError(
                f"{name}={value} has no effect on loss_type={shown}; leave it {unset}, or use "
                f"{'one of ' if len(users) > 1 else ''}{', '.join(users)}"
            )
    check_divergence(f_divergence, f_alpha)
    if f_divergence != "reverse_kl" and not (
        set(types) & set(_OF_A_DIFFERENCE) and set(types) <= {*_OF_A_DIFFERENCE, "sft"}
    ):
        raise ValueError(
            f"f_divergence={f_divergence!r} with loss_type={shown}: it is defined for losses of a "
            f"difference of scores only: {', '.join(_OF_A_DIFFERENCE)}; use reverse_kl"
        )


def _check_combination(types: tuple[str, ...], loss_weights: Sequence[float] | None) -> None:
    if len(set(types)) < len(types):
        raise ValueError(f"loss_type={types}: each type once; say how much in loss_weights")
    if set(types) & set(REFERENCE_FREE) and len(set(types) - {"sft"}) > 1:
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
    if not all(weight > 0 for weight in loss_weights):
        raise ValueError(f"loss_weights={tuple(loss_weights)}: wanted numbers > 0")


def _needed(
    name: str, lengths: Array | None, loss_type: str, like: Array | None = None
) -> jax.Array:
    if lengths is None:
        hint = "; or ipo_normalize=False for summed log-ratios" if loss_type == "ipo" else ""
        raise ValueError(
            f"loss_type={loss_type!r} counts tokens and {name} is None; pass the number of answer "
            f"tokens of each pair{hint}"
        )
    if like is None:
        return jnp.asarray(lengths, jnp.float32)
    return as_float32(**{"logps": like, name: lengths})[1]
