"""Batches from token ids: the layout by hand, what is cut and dropped, and what is refused."""

import numpy as np
import pytest

import jaxalign as ja

A, B, C = [5, 6, 7], [8, 9, 10, 11], [12, 13]


def rows_of(batch):
    return batch.inputs.tolist(), batch.targets.tolist(), batch.loss_mask.astype(int).tolist()


def test_documents_are_packed_and_shifted_once():
    batches, counts = ja.pack_tokens([A, B, C], rows=2, length=6, pad_id=1)
    (batch,) = batches
    # Best fit: B (4) and C (2) fill the first row, A has the second.
    assert rows_of(batch) == (
        [[8, 9, 10, 11, 12, 13], [5, 6, 7, 1, 1, 1]],
        [[9, 10, 11, 1, 13, 1], [6, 7, 1, 1, 1, 1]],
        [[1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]],
    )
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch.loss_mask.dtype == np.bool_
    assert batch.weights is None
    assert counts == (3, 3, 0, 0, 9, 6, 2)


def test_arrays_with_masks_and_labels_on_either_side():
    """What a collator of transformers gives: padded, labels not shifted, −100 outside answers."""
    left = np.array([[0, 5, 6, 7], [8, 9, 10, 11]])
    right = np.array([[5, 6, 7, 0], [8, 9, 10, 11]])
    for ids, mask in ((left, left > 0), (right, right > 0)):
        labels = np.where((ids == 7) | (ids >= 10), ids, -100)
        given = {"input_ids": ids, "attention_mask": mask.astype(int), "labels": labels}
        (batch,), counts = ja.pack_tokens(**given, length=4, packing=False)
        assert rows_of(batch) == (
            [[5, 6, 7, 0], [8, 9, 10, 11]],
            [[6, 7, 0, 0], [9, 10, 11, 0]],
            [[0, 1, 0, 0], [0, 1, 1, 0]],
        )
        assert (counts.tokens, counts.trained) == (7, 3)


def test_what_is_cut_and_dropped_is_counted_and_printed(capsys):
    trained = [[0, 0, 1], [0, 1, 1, 1], [0, 0]]
    batches, counts = ja.pack_tokens([A, B, C], trained=trained, rows=1, length=3, packing=False)
    assert [batch.inputs.tolist() for batch in batches] == [[A], [B[:3]]]
    assert (counts.given, counts.kept, counts.cut, counts.dropped) == (3, 2, 1, 1)
    assert "3 documents: 1 cut to 3 tokens, 1 dropped" in capsys.readouterr().out


def test_weights_of_tokens_and_documents_stand_at_the_targets():
    (batch,), _ = ja.pack_tokens([A, B], weights=[[9, 1, 2], [9, 3, 4, 5]], rows=1, length=8)
    assert batch.weights.tolist() == [[3, 4, 5, 0, 1, 2, 0, 0]]
    (batch,), _ = ja.pack_tokens([A, B], weights=[0.5, 2.0], rows=1, length=8)
    assert batch.weights.tolist() == [[2, 2, 2, 0, 0.5, 0.5, 0, 0]]


def test_pairs_share_a_row_and_segment_when_packed():
    prompts, chosen, rejected = [[5], [6, 7]], [[20, 21], [22]], [[30], [31, 32]]
    (batch,), counts = ja.pack_pairs(
        chosen, rejected, prompts, weights=[1.0, 3.0], margins=[0.5, -0.5],
        rows=2, length=8, packing=True,
    )  # fmt: skip
    # Sizes 3 and 4: the larger pair first.
    assert batch.chosen.inputs.tolist()[0] == [6, 7, 22, 5, 20, 21, 0, 0]
    assert batch.rejected.inputs.tolist()[0] == [6, 7, 31, 32, 5, 30, 0, 0]
    assert batch.chosen.loss_mask.astype(int).tolist()[0] == [0, 1, 0, 1, 1, 0, 0, 0]
    assert batch.mask.tolist() == [[True, True], [False, False]]
    assert batch.weights.tolist() == [[3, 1], [0, 0]]
    assert batch.margin.tolist() == [[-0.5, 0.5], [0, 0]]
    assert (counts.tokens, counts.trained) == (12, 6)


def test_pairs_from_labels_a_row_each():
    chosen = {"input_ids": [[5, 20, 21], [6, 22]], "labels": [[-100, 20, 21], [-100, 22]]}
    rejected = {"input_ids": [[5, 30], [6]], "labels": [[-100, 30], [-100]]}
    (batch,), counts = ja.pack_pairs(chosen, rejected, length=4)
    assert batch.mask is None
    assert batch.weights is None
    assert batch.chosen.inputs.tolist() == [[5, 20, 21, 0]]
    assert (counts.given, counts.dropped) == (2, 1)  # the second rejected side has no answer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": "text"}, "input_ids: got str"),
        ({"input_ids": [[1.5, 2.0]]}, r"input_ids\[0\]: got float64"),
        ({"input_ids": [[1, -2]]}, r"input_ids\[0\]: got -2 to 1, wanted ids ≥ 0"),
        ({"input_ids": [A], "labels": [[6, 7, 7]]}, r"labels\[0\]\[0\]: got 6 beside the token 5"),
        ({"input_ids": [A], "labels": [[5, 6]]}, r"labels\[0\]: got shape \(2,\), wanted \(3,\)"),
        ({"input_ids": [A], "labels": [A], "trained": [A]}, "got both"),
        ({"input_ids": [A], "attention_mask": []}, "attention_mask: got 0 lists for 1"),
        ({"input_ids": [A], "weights": [-1.0]}, "weights: got -1.0, wanted 0 or more"),
        ({"input_ids": [A], "weights": [[1, np.nan, 1]]}, r"weights\[0\]: wanted finite"),
        ({"input_ids": [[3], []]}, "no trained token is left in any document at length=8"),
        ({"input_ids": [A], "rows": 0}, "rows=0"),
    ],
)
def test_wrong_tokens_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ja.pack_tokens(**given, length=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([A], [B]), "chosen: got ids and no prompts"),
        (([A], [B], [A, B]), "chosen: got 1 answers for 2 prompts"),
        (({"input_ids": [A]}, [B]), "chosen: got a mapping with input_ids;"),
        (([A], [B, C], [A]), "rejected: got 2 answers for 1 prompts"),
    ],
)
def test_wrong_pairs_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ja.pack_pairs(*given, length=8)
