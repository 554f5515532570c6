"""Cuts and drops by hand, and that every row is kept or counted."""

import json

import laid
import numpy as np
import pytest

from jaxalign.data import (
    Encoded,
    graded_batches,
    preference_batches,
    prompt_batches,
    ranked_batches,
    sft_batches,
    step_batches,
    unpaired_batches,
)
from jaxalign.data.fit import fit, fit_prompt
from jaxalign.types import PromptBatch, RankedBatch


def _document(ids, marks):
    """Ids with `t` for trained."""
    return Encoded(np.asarray(ids, np.int32), np.array([m == "t" for m in marks]))


def _cut(ids, marks, length, keep, **options):
    result = fit([_document(ids, marks)], length, keep, **options)
    if isinstance(result, str):
        return result
    (document,) = result.documents
    return document.ids.tolist(), "".join(".t"[int(t)] for t in document.trained), result.cut


def test_one_document_by_hand():
    ids = [10, 11, 12, 13, 14, 15]
    # Nothing to cut, but what the template writes after the answer goes.
    assert _cut(ids, "..ttt.", 5, "answer_start") == ([10, 11, 12, 13, 14], "..ttt", False)
    assert _cut(ids, "..tttt", 4, "answer_start") == ([10, 11, 12, 13], "..tt", True)
    assert _cut(ids, "..tttt", 2, "answer_start") == "the answer begins beyond 2 tokens"
    assert _cut(ids, "..tttt", 5, "prompt_end") == ([11, 12, 13, 14, 15], ".tttt", True)
    assert _cut(ids, "..tttt", 4, "prompt_end") == "the answer alone is longer than 4 tokens"
    assert _cut(ids, "..tttt", 5, "whole") == "longer than 5 tokens"
    assert _cut(ids, "......", 9, "whole") == "no token to train"
    assert _cut(ids, "t.....", 9, "whole") == "no token to train"  # predicted by nothing
    # Plain text has no prompt: its start stays.
    assert _cut(ids, "tttttt", 4, "prompt_end") == ([10, 11, 12, 13], "tttt", True)


def test_the_beginning_of_text_token_stays():
    ids = [1, 11, 12, 13, 14, 15]
    assert _cut(ids, "...ttt", 5, "prompt_end", bos=1) == ([1, 12, 13, 14, 15], "..ttt", True)
    # It alone is no prompt.
    assert _cut(ids, "...ttt", 3, "prompt_end", bos=1).startswith("the answer alone")
    assert fit_prompt(np.array(ids), 3, "prompt_end", 1).tolist() == [1, 14, 15]
    assert fit_prompt(np.array(ids), 3, "prompt_end", None).tolist() == [13, 14, 15]
    assert fit_prompt(np.array(ids), 3, "whole", 1) == "longer than 3 tokens"
    assert fit_prompt(np.array(ids), 6, "whole", 1).tolist() == ids


def test_an_earlier_answer_that_loses_its_start_is_context():
    ids = list(range(10, 20))
    # Of the first answer (12 to 14) the start is cut off: what is left of it is not trained.
    assert _cut(ids, "..ttt..ttt", 7, "prompt_end") == ([*range(13, 20)], "....ttt", True)
    # Cut right before it: it is whole.
    assert _cut(ids, "..ttt..ttt", 8, "prompt_end") == ([*range(12, 20)], "ttt..ttt", True)


def test_pairs_lose_the_same_tokens_of_their_prompt():
    chosen = _document([1, 2, 3, 4, 20, 21], "....tt")
    rejected = _document([1, 2, 3, 4, 30, 31, 32, 33], "....tttt")
    result = fit([chosen, rejected], 6, "prompt_end")
    assert [d.ids.tolist() for d in result.documents] == [[3, 4, 20, 21], [3, 4, 30, 31, 32, 33]]
    assert result.cut
    assert fit([chosen, rejected], 4, "prompt_end") == "the answer alone is longer than 4 tokens"
    result = fit([chosen, rejected], 6, "answer_start")
    assert [d.ids.tolist() for d in result.documents] == [
        [1, 2, 3, 4, 20, 21],
        [1, 2, 3, 4, 30, 31],
    ]


def test_pairs_that_share_their_prompt_fit_together():
    chosen = _document([1, 2, 3, 4, 20, 21], "....tt")
    rejected = _document([1, 2, 3, 4, 30, 31, 32, 33], "....tttt")
    # 3 shared + (4 20 21) + (4 30 31 32 33) = 11 positions.
    assert not fit([chosen, rejected], 11, "whole", shared=True).cut
    assert fit([chosen, rejected], 10, "whole", shared=True) == "longer than 10 tokens"
    result = fit([chosen, rejected], 9, "prompt_end", shared=True)
    assert [d.ids.tolist()[:2] for d in result.documents] == [[3, 4], [3, 4]]
    # The longer answer is cut first, then both alike.
    result = fit([chosen, rejected], 9, "answer_start", shared=True)
    assert [len(d.ids) for d in result.documents] == [6, 6]
    result = fit([chosen, rejected], 7, "answer_start", shared=True)
    assert [len(d.ids) for d in result.documents] == [5, 5]
    assert isinstance(fit([chosen, rejected], 5, "answer_start", shared=True), str)


def test_keep_reaches_every_function(tiny):
    rows = [{"prompt": "hello " * 90, "completion": "there"}]
    kept = sft_batches(rows, tiny, rows=1, length=60, keep="prompt_end")
    (batch,) = kept
    assert kept.stats["cut"] == 1
    assert tiny.decode(batch.targets[batch.loss_mask]) == "there<|im_end|>"
    assert tiny.decode(batch.inputs[0]).endswith("<|im_start|>assistant\nthere<|im_end|>")
    with pytest.raises(ValueError, match="longer than 60 tokens': 1"):
        sft_batches(rows, tiny, rows=1, length=60, keep="whole")
    with pytest.raises(ValueError, match="longer than 60 tokens': 1"):
        prompt_batches([{"prompt": "hello " * 90}], tiny, rows=1, length=60, keep="whole")
    with pytest.raises(ValueError, match="keep: got 'answer_start' for prompts"):
        prompt_batches(rows, tiny, rows=1, length=60, keep="answer_start")


def test_lengths_filter_before_cutting(tiny):
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 40, 200)]
    options = {"rows": 4, "length": 64, "packing": False}
    stats = sft_batches(rows, tiny, min_tokens=20, max_tokens=100, **options).stats
    assert stats["dropped"] == {"fewer than 20 tokens": 1, "more than 100 tokens": 1}
    assert stats["kept"] == 1


_MAKERS = {
    sft_batches: lambda r: {"prompt": r["prompt"], "completion": r["chosen"]},
    preference_batches: lambda r: {k: r[k] for k in ("prompt", "chosen", "rejected")},
    prompt_batches: lambda r: {"prompt": r["prompt"]},
    unpaired_batches: lambda r: {
        "prompt": r["prompt"],
        "completion": r["chosen"],
        "label": r["margin"] % 2 == 0,
    },
    ranked_batches: lambda r: {
        "prompt": r["prompt"],
        "answers": [r["chosen"], r["rejected"]],
        "scores": [2, 1],
    },
    graded_batches: lambda r: {
        "prompt": r["prompt"],
        "response": r["chosen"],
        "helpfulness": r["margin"],
    },
    step_batches: lambda r: {
        "prompt": r["prompt"],
        "steps": [r["chosen"], r["rejected"]],
        "labels": [1, 0],
    },
}


def _spoil(row, rng):
    """One fault, or none."""
    row = dict(row)
    key = list(row)[int(rng.integers(len(row)))]
    kind = int(rng.integers(6))
    if kind == 0:
        del row[key]
    elif kind == 1:
        row[key] = None
    elif kind == 2:
        row[key] = {"x": [1, None]}
    elif kind == 3:
        row[key] = ""
    elif kind == 4:
        row[key] = "long " * 500
    return row


@pytest.mark.parametrize("make", _MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_in_are_rows_out_and_rows_dropped(tiny, tmp_path, make, streaming):
    if streaming and make is prompt_batches:
        pytest.skip("prompts are not streamed")
    rng = np.random.default_rng(5)
    good = [_MAKERS[make](row) for row in laid.pairs(60)]
    lines = [json.dumps(_spoil(row, rng)) for row in good]
    for at in (7, 20):
        lines[at] = lines[at][: len(lines[at]) // 2]
    lines[30] = "[1, 2]"
    lines[40] = '{"prompt": "a", "prompt": "b"}'
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    options = {"rows": 4, "length": 128, "on_error": "drop"}
    if streaming:
        options |= {"streaming": True, "window": 16}
        options |= {
            ranked_batches: {"answers": 2},
            graded_batches: {"attributes": ["helpfulness"]},
        }.get(make, {})
    batches = make(str(file), tiny, **options)
    given = sum(_rows(batch) for batch in batches)
    stats = batches.stats
    assert stats["read"] == 60
    assert stats["kept"] + sum(stats["dropped"].values()) == 60
    assert sum(stats["dropped"].values()) >= 20
    assert given == stats["kept"] > 5
    assert len(stats["dropped"]) >= 4
    with pytest.raises(ValueError, match=r"rows\.jsonl:\d+"):
        list(make(str(file), tiny, **(options | {"on_error": "stop"})))


def _rows(batch):
    """Examples of a batch, counted in its arrays."""
    if isinstance(batch, PromptBatch):
        return int((batch.index >= 0).sum())
    if isinstance(batch, RankedBatch):
        return int(batch.mask.any(axis=1).sum())
    tokens = getattr(batch, "tokens", getattr(batch, "chosen", batch))
    return int(tokens.segment_ids.max(axis=1).sum())
