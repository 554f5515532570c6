"""Judged answers and shared prompts, layout by layout, against documents put together by hand."""

import laid
import numpy as np
import pytest

from jaxalign.data import (
    Encoded,
    encode_prompt,
    graded_batches,
    preference_batches,
    ranked_batches,
    step_batches,
    unpaired_batches,
)
from jaxalign.data.branches import shared_rows, shared_size


def _document(tok, prompt, answer):
    """(ids, mask over targets) of a prompt and an answer."""
    return laid.expected(tok, [{"prompt": prompt, "completion": answer}])[0]


def test_shared_rows_by_hand():
    chosen = [Encoded(np.array([5, 6, 7, 8, 2]), np.array([0, 0, 0, 1, 1], bool))]
    rejected = [Encoded(np.array([5, 6, 7, 9, 4, 2]), np.array([0, 0, 0, 1, 1, 1], bool))]
    batch = shared_rows(chosen, rejected, [[0], []], 2, 11, 1, [3])
    assert batch.inputs.tolist() == [[5, 6, 7, 8, 2, 7, 9, 4, 2, 1, 1], [1] * 11]
    assert batch.targets[0].tolist() == [6, 7, 8, 2, 1, 9, 4, 2, 1, 1, 1]
    assert batch.branch_ids[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 0]
    assert batch.segment_ids.tolist() == [[1] * 9 + [0, 0], [0] * 11]
    assert batch.loss_mask[0].astype(int).tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert batch.source_ids[0].tolist() == [3] * 9 + [0, 0]
    assert shared_size(chosen[0], rejected[0]) == 9


def test_only_a_real_common_start_is_shared():
    # The second token differs although both prompts are four tokens long.
    chosen = [Encoded(np.array([5, 6, 7, 8, 2]), np.array([0, 0, 0, 0, 1], bool))]
    rejected = [Encoded(np.array([5, 9, 7, 8, 2]), np.array([0, 0, 0, 0, 1], bool))]
    assert shared_size(chosen[0], rejected[0]) == 10
    batch = shared_rows(chosen, rejected, [[0]], 1, 10, 0)
    assert batch.branch_ids[0].tolist() == [1] * 5 + [2] * 5
    assert batch.positions[0].tolist() == [*range(5), *range(5)]
    # Answers that begin alike are no prompt.
    rejected = [Encoded(np.array([5, 6, 7, 8, 3]), np.array([0, 0, 0, 1, 1], bool))]
    chosen = [Encoded(np.array([5, 6, 7, 8, 2]), np.array([0, 0, 0, 1, 1], bool))]
    assert shared_size(chosen[0], rejected[0]) == 2 + 3 + 3


@pytest.mark.parametrize("packing", [True, False])
def test_shared_prompts_hold_the_same_pairs(tiny, packing):
    pairs = laid.pairs()
    batches = preference_batches(
        pairs, tiny, rows=3, length=300, packing=packing, shared_prefix=True
    )
    found = []
    for batch in batches:
        tokens = batch.tokens
        slots = batch.mask.shape[1]
        assert batch.margin.shape == batch.mask.shape
        assert slots > 1 if packing else slots == 1
        for row in range(3):
            count = int(tokens.segment_ids[row].max())
            assert batch.mask[row].tolist() == [s < count for s in range(slots)]
            for segment in range(1, count + 1):
                pair = []
                for branch in (1, 2):
                    here = (tokens.segment_ids[row] == segment) & np.isin(
                        tokens.branch_ids[row], (0, branch)
                    )
                    ids, mask = tokens.inputs[row][here], tokens.loss_mask[row][here]
                    assert tokens.positions[row][here].tolist() == list(range(len(ids)))
                    assert tokens.targets[row][here][:-1].tolist() == ids[1:].tolist()
                    assert not mask[-1]
                    pair.append((tuple(ids.tolist()), tuple(mask.tolist())))
                found.append((*pair, float(batch.margin[row, segment - 1])))
    wanted = [
        (
            _document(tiny, p["prompt"], p["chosen"]),
            _document(tiny, p["prompt"], p["rejected"]),
            p["margin"],
        )
        for p in pairs
    ]
    assert sorted(found) == sorted(wanted)
    stats = batches.stats
    twice = sum(len(side[0]) for pair in wanted for side in pair[:2])
    saved = sum(len(encode_prompt(tiny, p["prompt"])) - 1 for p in pairs)
    assert stats["saved"] == saved
    assert stats["tokens"] == twice - saved


def test_mismatched_answers_are_the_next_rows(tiny):
    rows = [
        {"prompt": f"question {n}", "completion": f"answer {'x' * n}", "label": n % 2 == 0}
        for n in range(5)
    ]
    batches = unpaired_batches(rows, tiny, rows=3, length=64, shuffle=False)
    found = list(batches)
    assert [len(b.desirable) for b in found] == [3, 3]
    order = [[0, 1, 2], [3, 4]]
    for batch, members in zip(found, order, strict=True):
        following = members[1:] + members[:1]
        own = laid.documents(batch.tokens)
        other = laid.documents(batch.mismatched)
        for at, (n, m) in enumerate(zip(members, following, strict=True)):
            assert own[at] == _document(tiny, rows[n]["prompt"], rows[n]["completion"])
            assert other[at] == _document(tiny, rows[n]["prompt"], rows[m]["completion"])
            assert batch.desirable[at] == (n % 2 == 0)
    # A single answer has no other.
    (alone,) = unpaired_batches(rows[:1], tiny, rows=2, length=64)
    assert not alone.mismatched.loss_mask.any()
    assert alone.tokens.loss_mask.any(axis=1).tolist() == [True, False]


def test_ranked(tiny):
    rows = [
        {"prompt": "q", "answers": ["a", "bb", "ccc"], "scores": [1, 3, 2]},
        {"prompt": "r", "chosen": "good", "rejected": "bad"},
    ]
    (batch,) = ranked_batches(rows, tiny, rows=3, length=48, shuffle=False)
    assert batch.answers.inputs.shape == (3, 3, 48)
    assert batch.mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert batch.ranks.tolist() == [[1, 3, 2], [1, 0, 0], [0, 0, 0]]
    flat = [leaf.reshape(9, 48) for leaf in batch.answers[:5]]
    wanted = [("q", "a"), ("q", "bb"), ("q", "ccc"), ("r", "good"), ("r", "bad")]
    assert laid.documents(flat) == [_document(tiny, *each) for each in wanted]
    (wide,) = ranked_batches(rows, tiny, rows=2, length=48, answers=5)
    assert wide.mask.shape == (2, 5)
    with pytest.raises(ValueError, match="got 3 answers, wanted at most answers = 2"):
        ranked_batches(rows, tiny, rows=2, length=48, answers=2)


def test_graded(tiny):
    rows = [
        {"prompt": "q", "response": "a", "helpfulness": 4, "verbosity": 1},
        {"prompt": "r", "response": "b", "helpfulness": 2},
    ]
    (batch,) = graded_batches(rows, tiny, rows=3, length=48, shuffle=False)
    assert batch.scores.tolist() == [[4, 1], [2, 0], [0, 0]]
    assert batch.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert laid.documents(batch.tokens) == [_document(tiny, "q", "a"), _document(tiny, "r", "b")]
    options = {"rows": 2, "length": 48, "shuffle": False}
    (batch,) = graded_batches(rows, tiny, attributes=["verbosity", "helpfulness"], **options)
    assert batch.scores.tolist() == [[1, 4], [0, 2]]
    with pytest.raises(ValueError, match="wanted one of verbosity"):
        graded_batches(rows, tiny, attributes=["verbosity"], **options)


def test_steps(tiny):
    steps = ["one and one.", "that is two.", "so: 2"]
    rows = [{"prompt": "1 + 1", "steps": steps, "labels": [1, 0.5, 0]}]
    (batch,) = step_batches(rows, tiny, rows=2, length=120)
    (ids, mask), *rest = laid.documents(batch.tokens)
    assert not rest
    assert (ids, mask) == _document(tiny, "1 + 1", "\n".join(steps))
    places = np.flatnonzero(batch.mask[0])
    assert batch.labels[0][places].tolist() == [1, 0.5, 0]
    start = tiny.decode(ids).index("one and")
    for number, place in enumerate(places):
        said = tiny.decode(ids[: place + 1])[start:]
        assert said.rstrip() == "\n".join(steps[: number + 1])
    assert not batch.mask[1].any()
    assert batch.labels[~batch.mask].tolist() == [0] * int((~batch.mask).sum())
    # Steps that are cut off have no label.
    (cut,) = step_batches(rows, tiny, rows=1, length=int(places[1]) + 1)
    assert cut.labels[cut.mask].tolist() == [1, 0.5]
