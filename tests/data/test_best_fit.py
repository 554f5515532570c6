"""Packing decisions and row layout against hand-written rows and simple loops."""

import json

import numpy as np
import pytest

from jaxalign.data import (
    Encoded,
    best_fit,
    best_fit_split,
    preference_batches,
    sft_batches,
    wrapped,
)
from jaxalign.data.packing import prompt_rows, token_rows


def test_by_hand():
    # 9; 6 (3 free); 5 (4 free); 4 fits best after 5; 3 after 6; 2 opens a row; 1 after 2.
    assert best_fit([2, 3, 4, 5, 6, 9, 1], 9) == [[5], [4, 1], [3, 2], [0, 6]]
    assert best_fit([3, 3, 3], 6) == [[0, 1], [2]]
    assert best_fit([], 4) == []


# From TRL 1.16's packing of documents 0, 1, …, document d holding 100 · (d mod 5) + 0, 1, 2, …
_LENGTHS = [5, 9, 3, 12, 7, 2, 8, 16, 4, 6]
_BFD = [[16], [12, 4], [9, 7], [8, 6, 2], [5, 3]]
_WRAPPED = [
    [*range(100, 105), *range(200, 209), 300, 301],
    [302, *range(400, 412), 0, 1, 2],
    [3, 4, 5, 6, 100, 101, *range(200, 208), 300, 301],
    [*range(302, 316), 400, 401],
    [402, 403, 0, 1, 2, 3, 4, 5],
]


def _reference_documents():
    return [list(range(100 * (d % 5), 100 * (d % 5) + n)) for d, n in enumerate(_LENGTHS, start=1)]


def test_golden_packs():
    assert [[_LENGTHS[i] for i in row] for row in best_fit(_LENGTHS, 16)] == _BFD
    documents = _reference_documents()
    rows = wrapped(_LENGTHS, 16)
    found = [[t for p in row for t in documents[p.document][p.start : p.end]] for row in rows]
    assert found == _WRAPPED


def test_what_is_too_long_is_split_by_hand():
    # 9 and 3 fill rows of 4 as 4 + 4 + 1 and 3, and the 1 goes beside the 3; 4 is not cut.
    rows = best_fit_split([9, 3, 4], 4)
    assert rows == [[(0, 0, 4)], [(0, 4, 8)], [(2, 0, 4)], [(1, 0, 3), (0, 8, 9)]]
    encoded = [Encoded(np.arange(n), np.ones(n, bool)) for n in (9, 3, 4)]
    batch = token_rows(encoded, rows, rows=4, length=4, pad_id=99)
    # Every token but the first of each document is trained once.
    assert sorted(batch.targets[batch.loss_mask]) == sorted([*range(1, 9), 1, 2, 1, 2, 3])
    assert batch.positions[3].tolist() == [0, 1, 2, 0]
    assert batch.segment_ids[3].tolist() == [1, 1, 1, 2]


def test_the_golden_packs_are_the_reference(shared):
    reference = json.loads((shared / "oracle" / "packing.json").read_text())
    assert reference["bfd"]["seq_lengths"] == _BFD
    assert reference["wrapped"]["input_ids"] == _WRAPPED


def test_wrapped_rows_train_every_token_but_the_first_of_each_document():
    documents = _reference_documents()
    encoded = [Encoded(np.array(d, np.int32), np.ones(len(d), bool)) for d in documents]
    rows = wrapped(_LENGTHS, 16)
    batch = token_rows(encoded, rows, rows=6, length=16, pad_id=9)
    trained = batch.targets[batch.loss_mask].tolist()
    assert trained == [t for d in documents for t in d[1:]]
    assert batch.inputs[:5][batch.segment_ids[:5] > 0].tolist() == [t for d in documents for t in d]
    # A document that goes on in the next row starts anew there: its positions too.
    assert batch.segment_ids[1].tolist() == [1] + [2] * 12 + [3] * 3
    assert batch.positions[1].tolist() == [0, *range(12), 0, 1, 2]
    assert not batch.loss_mask[5].any()


def test_no_more_than_so_many_in_a_row():
    rows = best_fit([3, 3, 2, 2, 1, 1], 12, most=3)
    assert sorted(i for row in rows for i in row) == list(range(6))
    assert [len(row) for row in rows] == [3, 3]


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


def test_rows_of_a_file_are_split_too(tiny, tmp_path):
    """A conversation longer than a row: all of its answer is trained, the one at hand is whole."""
    rows = [
        {"prompt": "Say it.", "completion": "a long answer " * 30},
        {"prompt": "Hi", "completion": "short"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"rows": 2, "length": 64, "shuffle": False}
    whole = sft_batches([str(path)], tiny, rows=2, length=4096, packing=False)
    wanted = sorted(np.concatenate([b.targets[b.loss_mask] for b in whole]).tolist())
    for streaming in (False, True):
        split = sft_batches(
            [str(path)], tiny, packing="best_fit_split", streaming=streaming, **options
        )
        found = np.concatenate([batch.targets[batch.loss_mask] for batch in split])
        assert sorted(found.tolist()) == wanted
    with pytest.raises(ValueError, match="keep: got 'whole', wanted it None with packing"):
        sft_batches([str(path)], tiny, packing="best_fit_split", keep="whole", **options)
    pair = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(ValueError, match="packing: got 'best_fit_split' for pairs"):
        preference_batches(pair, tiny, packing="best_fit_split", **options)
