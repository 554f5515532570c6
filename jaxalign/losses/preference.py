"""The table of preference losses: what each one computes, and which options it takes.

With s = log π(y|x) − log π_ref(y|x) summed over the answer (or the f-divergence's transform of it),
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

The formulas themselves are in `losses.forms` and `losses.reference_free`. To add a loss, write a
function there and a row in `TABLE` here; from outside the package, call `register` once.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.losses import forms, reference_free
from jaxalign.losses.masked import as_float32, keep
from jaxalign.losses.ranges import outside
from jaxalign.types import Array, Weighted

Losses = jax.Array
Pair = tuple[jax.Array, jax.Array]
"""(chosen, rejected), float32, of one shape."""


class Option(NamedTuple):
    """An option of a preference loss.

    Attributes:
      default: its value where none is given.
      valid: value → whether it is in range; None: any value is.
      wanted: the range in words, for the error message.
    """

    default: Any
    valid: Callable[[Any], bool] | None = None
    wanted: str = ""


class Pairs(NamedTuple):
    """The arrays that a loss may read from a batch of pairs; float32, all of one shape.

    Attributes:
      logps: log π of both answers, summed over tokens.
      ref_logps: log π_ref of both; None without a reference.
      ratios: log π − log π_ref of both; None without a reference.
      scores: s of both, the log-ratios after the f-divergence; None without a reference.
      lengths: tokens of both answers; either may be None.
      mask: bool, which pairs exist.
    """

    logps: Pair
    ref_logps: Pair | None
    ratios: Pair | None
    scores: Pair | None
    lengths: tuple[Array | None, Array | None]
    mask: jax.Array

    def needed_lengths(self, loss_type: str) -> Pair:
        """The lengths, for a loss that needs them.

        Raises:
          ValueError: one is missing, or has another shape.
        """
        chosen, rejected = (
            _needed(name, length, loss_type, self.logps[0])
            for name, length in zip(
                ("chosen_lengths", "rejected_lengths"), self.lengths, strict=True
            )
        )
        return chosen, rejected

    def scores_per_token(self, loss_type: str) -> Pair:
        """s / n of both answers."""
        (chosen, rejected), (n_chosen, n_rejected) = (
            _known(self.scores),
            self.needed_lengths(loss_type),
        )
        # A slot of a packed row that holds no pair has length 0 and log-ratio 0.
        return chosen / jnp.maximum(n_chosen, 1.0), rejected / jnp.maximum(n_rejected, 1.0)


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A row of the table.

    Attributes:
      loss: (pairs, beta=β, the options by name) → losses, of the pairs' shape; with `own_rewards`
        (losses, chosen rewards, rejected rewards).
      options: the options that it takes, by name.
      own_rewards: the loss compares rewards that need no reference, and returns them.
      difference: the loss reads only the difference of the scores, so it can use f-divergences: in
        other losses the common part of the scores, β log Z(x), would not cancel.
      whole_batch: the loss compares all pairs of a batch, so that the batch cannot be split.
      check: (the options by name) → raises ValueError for values that do not go together.
    """

    loss: Callable[..., Any]
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    own_rewards: bool = False
    difference: bool = False
    whole_batch: bool = False
    check: Callable[..., None] | None = None

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The subset of all options that this loss takes, with its defaults."""
        return {name: options.get(name, option.default) for name, option in self.options.items()}


def register(
    name: str,
    form: Callable[..., Losses],
    options: Mapping[str, Option] | None = None,
    *,
    difference: bool = False,
) -> None:
    """Adds a preference loss to the table; callable from outside the package.

    `dpo.Config(loss_type=name, loss_options={…})` and `preference_loss` then accept it.

    Args:
      name: the `loss_type`.
      form: (s_c, s_r, beta=β, the options by name) → losses, unreduced, like those of
        `losses.forms`.
      options: the options that `form` takes besides `beta`.
      difference: `form` reads s_c − s_r only, see `PreferenceLoss`.

    Raises:
      ValueError: the name is taken, or `form` does not take these options.
    """
    if name in TABLE:
        raise ValueError(f"loss_type={name!r} exists already; register the loss by another name")
    options = {} if options is None else options
    parameters = inspect.signature(form).parameters
    takes = {x.name for x in parameters.values() if x.kind is x.KEYWORD_ONLY} - {"beta"}
    if takes != set(options):
        raise ValueError(
            f"loss_type={name!r}: its function takes the options {sorted(takes)} by keyword, and "
            f"{sorted(options)} were registered; wanted the same names"
        )
    TABLE[name] = PreferenceLoss(on_scores(form), options, difference=difference)


def option_names() -> tuple[str, ...]:
    """The options of all losses."""
    return tuple(dict.fromkeys(name for row in TABLE.values() for name in row.options))


def chosen_nll(logps: Array, lengths: Array, mask: Array) -> Weighted:
    """Negative log-likelihood of the chosen answers: Σ −log π(y_c) with Σ n_c, in nats and tokens.

    Args:
      logps: log π of the chosen answers, summed over tokens, any shape.
      lengths: n_c, the same shape.
      mask: which pairs exist.
    """
    return Weighted(-jnp.sum(keep(logps, mask)), jnp.sum(keep(lengths, mask)))


# Ways to make a table row from a function.


def on_scores(form: Callable[..., Losses]) -> Callable[..., Losses]:
    """Turns a form of the two scores into a loss on `Pairs`."""

    def loss(pairs: Pairs, **options: Any) -> Losses:
        return form(*_known(pairs.scores), **options)

    return loss


def _sigmoid_norm(pairs: Pairs, *, beta: float) -> Losses:
    scores = pairs.scores_per_token("sigmoid_norm")
    return forms.sigmoid(*scores, beta=beta, label_smoothing=0.0)


def _ipo(pairs: Pairs, *, beta: float, ipo_normalize: bool) -> Losses:
    scores = pairs.scores_per_token("ipo") if ipo_normalize else _known(pairs.scores)
    return forms.ipo(*scores, beta=beta)


def _aot(pairs: Pairs, *, beta: float, label_smoothing: float) -> Losses:
    (chosen, rejected), (ref_chosen, ref_rejected) = pairs.logps, _known(pairs.ref_logps)
    return forms.transport(
        chosen - rejected,
        ref_chosen - ref_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
        mask=pairs.mask,
    )


def _aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float) -> Losses:
    return forms.transport(
        *_known(pairs.ratios), beta=beta, label_smoothing=label_smoothing, mask=pairs.mask
    )


def _sft(pairs: Pairs, *, beta: float, chosen_sft_logps: Array | None) -> Losses:
    del beta
    logps = pairs.logps[0] if chosen_sft_logps is None else chosen_sft_logps
    lengths = _needed("chosen_lengths", pairs.lengths[0], "sft")
    return jnp.full(pairs.mask.shape, chosen_nll(logps, lengths, pairs.mask).mean())


def _simpo(pairs: Pairs, **options: Any) -> reference_free.Result:
    chosen, rejected = pairs.needed_lengths("simpo")
    return reference_free.simpo(
        *pairs.logps, chosen_lengths=chosen, rejected_lengths=rejected, **options
    )


def _orpo(pairs: Pairs, *, beta: float) -> reference_free.Result:
    chosen, rejected = pairs.needed_lengths("orpo")
    return reference_free.orpo(
        *pairs.logps, chosen_lengths=chosen, rejected_lengths=rejected, beta=beta
    )


def _cpo(pairs: Pairs, **options: Any) -> reference_free.Result:
    return reference_free.cpo(*pairs.logps, **options)


def _check_exo_pair(*, label_smoothing: float) -> None:
    if outside(label_smoothing, lambda x: x != 0):
        raise ValueError(
            "label_smoothing=0 with loss_type='exo_pair': the loss contains log(label_smoothing); "
            "set it above 0, e.g. 1e-3"
        )


_SMOOTHING = {"label_smoothing": Option(0.0, lambda x: 0 <= x < 0.5, "0 ≤ label_smoothing < 0.5")}
_NORMALIZE = {"ipo_normalize": Option(True)}
_TAU = {"discopop_tau": Option(0.05, lambda x: x > 0, "a number > 0; 0.05 is published")}
_GAMMA = {"simpo_gamma": Option(0.5, lambda x: 0 <= x < math.inf, "a number ≥ 0; 0.5 is usual")}

_ARRAY = Option(None, lambda x: x is None or jnp.ndim(x) > 0, "an array of the pairs' shape")

TABLE: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(on_scores(forms.sigmoid), _SMOOTHING, difference=True),
    "hinge": PreferenceLoss(on_scores(forms.hinge), difference=True),
    "ipo": PreferenceLoss(_ipo, _NORMALIZE, difference=True),
    "robust": PreferenceLoss(on_scores(forms.robust), _SMOOTHING, difference=True),
    "exo_pair": PreferenceLoss(
        on_scores(forms.exo_pair), _SMOOTHING, difference=True, check=_check_exo_pair
    ),
    "nca_pair": PreferenceLoss(on_scores(forms.nca_pair)),
    "bco_pair": PreferenceLoss(on_scores(forms.bco_pair), {"reward_shift": Option(0.0)}),
    "sppo_hard": PreferenceLoss(on_scores(forms.sppo_hard)),
    "apo_zero": PreferenceLoss(on_scores(forms.apo_zero)),
    "apo_down": PreferenceLoss(on_scores(forms.apo_down)),
    "discopop": PreferenceLoss(on_scores(forms.discopop), _TAU, difference=True),
    "sigmoid_norm": PreferenceLoss(_sigmoid_norm, difference=True),
    "aot": PreferenceLoss(_aot, _SMOOTHING, whole_batch=True),
    "aot_unpaired": PreferenceLoss(_aot_unpaired, _SMOOTHING, whole_batch=True),
    "sft": PreferenceLoss(_sft, {"chosen_sft_logps": _ARRAY}),
    "simpo": PreferenceLoss(_simpo, _SMOOTHING | _GAMMA, own_rewards=True),
    "orpo": PreferenceLoss(_orpo, own_rewards=True),
    "cpo": PreferenceLoss(_cpo, _SMOOTHING, own_rewards=True),
}
"""`loss_type` → its row."""


def _known(pair: Pair | None) -> Pair:
    if pair is None:
        raise ValueError("this loss compares with a reference, and the pairs have none")
    return pair


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
