"""The other objectives of a reward model as the battery sees them: rankings, grades, steps."""

import cases
import jax
import numpy as np
import tiny
from cases import LENGTHS, ROWS, Case

from jaxalign.algorithms import reward
from jaxalign.models.scorer import Scorer
from jaxalign.types import GradedBatch, RankedBatch, StepBatch

ANSWERS = 3
ATTRIBUTES = ("helpfulness", "verbosity")
GRADER = Scorer(tiny.DECODER, ATTRIBUTES)


# Rankings: two or three answers a prompt, some of equal rank; one prompt whose answers all are.


def _ranked(rng):
    rows = []
    for row, length in enumerate(LENGTHS):
        count = 2 + row % 2
        ranks = rng.permutation(count).astype(np.float32)
        if row == 1:
            ranks[:] = 1
        elif row == 3:
            ranks = np.array([2, 1, 1], np.float32)
        lengths = [length, *rng.integers(3, max(LENGTHS) + 1, count - 1)]
        answers = [tiny.document(rng, int(size), prompt=1) for size in lengths]
        rows.append({"answers": answers, "ranks": ranks})
    return rows


def _ranked_batch(rows, groups, length, left=False):
    """One prompt a row: answers that a prompt does not have are empty rows."""
    flat = [answer for row in rows for answer in row["answers"]]
    starts = np.cumsum([0] + [len(row["answers"]) for row in rows])
    places, ranks = [], np.zeros((len(groups), ANSWERS), np.float32)
    mask = np.zeros(ranks.shape, bool)
    for at, group in enumerate(groups):
        for slot in range(ANSWERS):
            there = bool(group) and slot < len(rows[group[0]]["answers"])
            places.append([int(starts[group[0]]) + slot] if there else [])
            mask[at, slot] = there
            if there:
                ranks[at, slot] = rows[group[0]]["ranks"][slot]
    laid = tiny.token_batch(tiny.lay(flat, places, length, left=left))
    answers = jax.tree.map(lambda x: x.reshape(len(groups), ANSWERS, length), laid)
    return RankedBatch(answers, ranks, mask)


def _spoil_ranked(batch, rng):
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch.answers)
    spoilt = tiny.spoil(flat, rng)
    answers = jax.tree.map(lambda x, y: y.reshape(x.shape), batch.answers, spoilt)
    return RankedBatch(answers, np.where(batch.mask, batch.ranks, np.float32(np.nan)), batch.mask)


# Grades: two attributes, of which some rows lack one.


def _graded(rng):
    return [
        {
            "document": tiny.document(rng, length),
            "grades": rng.uniform(0, 4, 2).astype(np.float32),
            "given": np.array([row % 3 != 0, row % 4 != 1]),
        }
        for row, length in enumerate(LENGTHS)
    ]


def _graded_batch(rows, groups, length, left=False):
    laid = tiny.lay([row["document"] for row in rows], groups, length, left=left)
    scores, mask = np.zeros((len(groups), 2), np.float32), np.zeros((len(groups), 2), bool)
    for at, group in enumerate(groups):
        for which in group:
            mask[at] = rows[which]["given"]
            scores[at] = np.where(mask[at], rows[which]["grades"], 0)
    return GradedBatch(tiny.token_batch(laid), scores, mask)


def _spoil_graded(batch, rng):
    scores = np.where(batch.mask, batch.scores, np.float32(np.nan))
    return GradedBatch(tiny.spoil(batch.tokens, rng), scores, batch.mask)


# Steps: every third token ends one, with soft labels; the last token always does.


def _steps(rng):
    documents = [tiny.document(rng, length) for length in LENGTHS]
    for one in documents:
        size = len(one["inputs"])
        ends = (np.arange(size) % 3 == 2) | (np.arange(size) == size - 1)
        one["mask"] = ends
        one["labels"] = np.where(ends, rng.uniform(0, 1, size), 0).astype(np.float32)
    return documents


def _step_batch(documents, groups, length, left=False):
    rows = tiny.lay(documents, groups, length, left=left)
    return StepBatch(tiny.token_batch(rows), rows["labels"], rows["mask"])


def _spoil_steps(batch, rng):
    labels = np.where(batch.mask, batch.labels, np.float32(np.nan))
    return StepBatch(tiny.spoil(batch.tokens, rng), labels, batch.mask)


def _case(name, scorer, config, documents, batch, spoil):
    return Case(
        name,
        scorer.axes,
        scorer.shapes,
        lambda tx, **kw: reward.make_step(scorer, tx, config, **kw),
        cases.SIMPLE,
        documents,
        batch,
        spoil,
    )


REWARD_CASES = (
    _case("ranking", tiny.SCORER, reward.Config(objective="ranking"), _ranked, _ranked_batch,
          _spoil_ranked),
    _case("regression", GRADER, reward.Config(objective="regression", attributes=ATTRIBUTES),
          _graded, _graded_batch, _spoil_graded),
    _case("steps", tiny.SCORER, reward.Config(objective="steps"), _steps, _step_batch,
          _spoil_steps),
)  # fmt: skip

PACKS = {"ranking": False, "regression": False, "steps": True}
EMPTY = [[]] * ROWS
