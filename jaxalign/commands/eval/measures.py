"""Evaluations of one model: KL and reward accuracy here, the others in `run.evaluation`."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from jaxalign.data.fields import fail
from jaxalign.data.rows import to_prompt
from jaxalign.rewards.scoring import load_scorer, score_rows
from jaxalign.run.evaluation.figures import Figure, Measured, mean, share
from jaxalign.run.evaluation.language_model import EvalOptions, EvaluatedModel
from jaxalign.run.evaluation.measures import (
    measure_choice,
    measure_gsm8k,
    measure_ifeval,
    measure_loss,
    rows_of,
)

__all__ = [
    "measure_choice",
    "measure_gsm8k",
    "measure_ifeval",
    "measure_kl",
    "measure_loss",
    "measure_reward",
]


def measure_kl(model: EvaluatedModel, reference: EvaluatedModel, files: Sequence[str]) -> Measured:
    """The distance to a reference, on answers that the model samples at temperature 1.

        d_t = log π(y_t) − log π_ref(y_t),   KL ≈ E Σ_t d_t (k1),   E exp(−d_t) − 1 + d_t (k3)

    `kl` is k1, summed over an answer, in nats per answer; `kl_token` is k3, in nats per token
    (http://joschu.net/blog/kl-approx.html).

    Raises:
      ValueError: the models' tokens differ.
    """
    if model.tok.get_vocab() != reference.tok.get_vocab():
        raise ValueError(
            "--reference: its tokenizer has another vocabulary than the model's, so their "
            "probabilities cannot be compared; give the model that the tuned one started from"
        )
    prompts = [to_prompt(row).messages for row in rows_of(files, model.options)]
    samples = model.samples([list(prompt) for prompt in prompts])
    documents = [sampled.document for sampled in samples]
    gaps = [p - q for p, q in zip(model.logprobs(documents), reference.logprobs(documents),
                                  strict=True)]  # fmt: skip
    tokens = np.concatenate(gaps)
    k3 = np.expm1(-tokens) + tokens
    unfinished = sum(not sampled.finished for sampled in samples)
    notes = [f"{unfinished} answers were cut at {model.options.max_new_tokens} tokens"]
    return Measured(
        {
            "kl": mean([gap.sum() for gap in gaps], "answers"),
            "kl_token": Figure(float(k3.mean()), None, None, len(tokens), "tokens"),
            "length": mean([len(gap) for gap in gaps], "answers"),
        },
        notes * bool(unfinished),
    )


def measure_reward(
    source: str, files: Sequence[str], options: EvalOptions, by: str | None = None
) -> Measured:
    """Accuracy of a reward model: how often the chosen answer scores above the rejected one.

    Args:
      source: the reward model.
      files: pairs, such as RewardBench's.
      options: how it is asked.
      by: column with the source of a row; None: `subset`, if rows have it.

    Raises:
      ValueError: a row that is not a pair, or lacks the column.
    """
    rows = rows_of(files, options)
    column = ("subset" if all("subset" in row.data for row in rows) else None) if by is None else by
    for row in rows:
        if column is not None and column not in row.data:
            fail(row.origin, column, "no such column", "the source of the row", "see --by")
    scorer, params, tok = load_scorer(source)
    scored = score_rows(
        scorer,
        params,
        tok,
        rows,
        batch=options.batch,
        length=options.length,
        chat_template=options.chat_template,
        thinking=options.thinking,
    )
    wins: dict[str, list[float]] = collections.defaultdict(list)
    ties, kept = 0, []
    for row, result in zip(rows, scored.results, strict=True):
        margin = result.get("margin") if isinstance(result, dict) else None
        if not isinstance(margin, float):
            fail(row.origin, "chosen", "no pair with one score", "chosen and rejected answers",
                 "evaluate a reward model with one score on pairs")  # fmt: skip
        ties += margin == 0
        for name in ("", *(() if column is None else (str(row.data[column]),))):
            wins[name].append(float(margin > 0))
        kept.append({"origin": row.origin} | result)
    figures = {f"accuracy/{name}" if name else "accuracy": share(w, "pairs")
               for name, w in wins.items()}  # fmt: skip
    parts = [np.mean(w) for name, w in wins.items() if name]
    if parts:
        average = Figure(float(np.mean(parts)), None, None, len(parts), "sources")
        figures["accuracy_by_source"] = average
    notes = [f"{ties} pairs have equal scores and count as wrong"] * bool(ties)
    notes += [f"{scored.cut} answers cut at {options.length} tokens"] * bool(scored.cut)
    return Measured(figures, notes, kept)
