"""Packing decisions and row layout against hand-written rows and simple loops."""

import json

import numpy as np
import pytest

from jaxalign.data import Encoded, best_fit
from jaxalign.data.packing import prompt_rows, token_rows


def test_by_hand():
    # 9; 6 (3 free); 5 (4 free); 4 fits best after 5; 3 after 6; 2 opens a row; 1 after 2.
    assert best_fit([2, 3, 4, 5, 6, 9, 1], 9) == [[5], [4, 1], [3, 2], [0, 6]]
    assert best_fit([3, 3, 3], 6) == [[0, 1], [2]]
    assert best_fit([], 4) == []


def test_the_reference_packs(shared):
    """Lengths of TRL's `bfd` rows, which follow the same rule."""
    reference = json.loads((shared / "oracle" / "packing.json").read_text())["bfd"]
    lengths = [5, 9, 3, 12, 7, 2, 8, 16, 4, 6]
    rows = best_fit(lengths, 16)
    assert [[lengths[i] for i in row] for row in rows] == reference["seq_lengths"]


def test_against_a_plain_search():
    rng = np.random.default_rng(0)
    for _ in range(30):
        capacity = int(rng.integers(5, 60))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 80))).tolist()
        rows = best_fit(lengths, capacity)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        free: list[int] = []
        for size in sorted(lengths, reverse=True):
            fitting = [f for f in free if f >= size]
            if fitting:
                free[free.index(min(fitting))] -= size
            else:
                free.append(capacity - size)
        assert sorted(capacity - sum(lengths[i] for i in row) for row in rows) == sorted(free)


def test_too_long_is_an_error():
    with pytest.raises(ValueError, match="got 2 to 5, wanted 1 to capacity = 4"):
        best_fit([2, 5], 4)


def test_row_layout_by_hand():
    documents = [
        Encoded(np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True])),
        Encoded(np.array([1, 2], np.int32), np.array([True, True])),
    ]
    batch = token_rows(documents, [[0, 1]], rows=2, length=7, pad_id=9)
    assert batch.inputs.tolist() == [[5, 6, 7, 8, 1, 2, 9], [9] * 7]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 2, 9, 9], [9] * 7]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0], [0] * 7]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 0], [0] * 7]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 0, 1, 0, 0], [0] * 7]
    kinds = [leaf.dtype for leaf in batch[:5]]
    assert kinds == [np.int32] * 4 + [np.bool_]


def test_prompt_layout_by_hand():
    prompts = [np.array([1, 2, 3], np.int32), np.array([4], np.int32)]
    batch = prompt_rows(prompts, [1, 0], rows=3, length=4, pad_id=7)
    assert batch.tokens.tolist() == [[7, 7, 7, 4], [7, 1, 2, 3], [7] * 4]
    assert batch.mask.astype(int).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0] * 4]
    assert batch.index.tolist() == [1, 0, -1]
