"""Losses as mathematics: arrays in, unreduced arrays out, no model, config or logits.

Nothing here averages over examples: divide with `losses.masked`, once for the whole batch. Inputs
of any float type are computed in float32. A loss takes no mask, unless it compares the entries of a
row. Before the call, zero the slots that do not count with `losses.masked.keep`, so that a NaN in
them never reaches a gradient.
"""

from jaxalign.losses import (
    advantages,
    aggregate,
    divergence,
    dpo,
    forms,
    graded,
    kto,
    ppo,
    preference,
    process,
    ranking,
    reference_free,
    reward,
    router,
    sft,
    tokens,
)

__all__ = [
    "advantages",
    "aggregate",
    "divergence",
    "dpo",
    "forms",
    "graded",
    "kto",
    "ppo",
    "preference",
    "process",
    "ranking",
    "reference_free",
    "reward",
    "router",
    "sft",
    "tokens",
]
