"""Batches: nothing lost, nothing twice, one shape, exact resume, counts that add up."""

import copy
import json

import laid
import numpy as np
import pytest
from laid import documents, expected, same

from jaxalign.data import encode_prompt, preference_batches, prompt_batches, sft_batches


@pytest.fixture
def talks():
    return laid.talks()


@pytest.fixture
def pairs():
    return laid.pairs()


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_once_with_its_mask(tiny, talks, packing):
    batches = sft_batches(talks, tiny, rows=4, length=420, packing=packing)
    found = []
    for batch in batches:
        assert all(leaf.shape == (4, 420) for leaf in batch[:5])
        assert all(leaf.dtype == np.int32 for leaf in batch[:4])
        assert batch.loss_mask.dtype == np.bool_
        found += documents(batch)
    assert sorted(found) == expected(tiny, talks)
    assert batches.stats["cut"] == 0
    assert batches.stats["tokens"] == sum(len(ids) for ids, _ in found)
    assert batches.stats["trained"] == sum(sum(mask) for _, mask in found)
    assert batches.stats["fill"] == batches.stats["tokens"] / (batches.stats["rows"] * 420)
    assert len(batches) == len(list(batches)) == -(-batches.stats["rows"] // 4)
    if packing:
        assert batches.stats["rows"] < 37
        assert batches.stats["fill"] > 0.85
    else:
        assert batches.stats["rows"] == 37


def test_the_last_batch_is_filled_with_empty_rows(tiny, talks):
    last = list(sft_batches(talks[:5], tiny, rows=4, length=420, packing=False))[-1]
    assert last.segment_ids.max(axis=1).tolist() == [1, 0, 0, 0]
    assert not last.loss_mask[1:].any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("buckets", [None, (210, 420)])
def test_rows_of_any_number_go_on_for_ever(tiny, talks, rows, buckets):
    batches = sft_batches(
        talks[:5], tiny, rows=rows, length=420, packing=False, epochs=None, buckets=buckets
    )
    for _, batch in zip(range(12), batches, strict=False):
        assert len(batch.inputs) == rows
    batches.close()


def test_epochs_reshuffle_and_run_on_across_their_ends(tiny, talks):
    def order(**options):
        batches = sft_batches(talks, tiny, rows=5, length=420, packing=False, **options)
        return [ids for batch in batches for ids, _ in documents(batch)]

    three = order(epochs=3, seed=7)
    epochs = [three[i : i + 37] for i in (0, 37, 74)]
    assert len(three) == 3 * 37
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(epochs=3, seed=7) == three
    assert order(epochs=1, seed=8) != epochs[0]
    plain = order(shuffle=False)
    assert plain == [expected(tiny, [row])[0][0] for row in talks]


def test_endless_epochs(tiny, talks):
    batches = sft_batches(talks, tiny, rows=40, length=420, epochs=None)
    iterator = iter(batches)
    assert len([next(iterator) for _ in range(5)]) == 5
    with pytest.raises(TypeError, match="goes on forever"):
        len(batches)


def test_resume_gives_exactly_the_next_batch(tiny, talks, pairs):
    for make in (
        lambda: sft_batches(talks, tiny, rows=3, length=420, epochs=2, packing=False),
        lambda: preference_batches(pairs, tiny, rows=3, length=420, epochs=2, packing=True),
        lambda: prompt_batches(pairs, tiny, rows=3, length=420, epochs=2),
    ):
        whole = list(make())
        assert not same(whole[0], whole[1])
        for stop in (0, 1, 4, len(whole)):
            first = make()
            iterator = iter(first)
            for _ in range(stop):
                next(iterator)
            state = json.loads(json.dumps(first.get_state()))
            second = make()
            second.set_state(state)
            assert second.get_state() == state
            rest = list(second)
            assert len(rest) == len(whole) - stop
            assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))
            # Only the pass after set_state starts there.
            assert len(list(second)) == len(whole)


def test_a_state_of_other_data_or_settings_is_refused(tiny, talks):
    state = sft_batches(talks, tiny, rows=3, length=420).get_state()
    more_epochs = sft_batches(talks, tiny, rows=3, length=420, epochs=9)
    more_epochs.set_state(state)
    for other in (
        sft_batches(talks[1:], tiny, rows=3, length=420),
        sft_batches(talks, tiny, rows=4, length=420),
        sft_batches(talks, tiny, rows=3, length=421),
        sft_batches(talks, tiny, rows=3, length=420, seed=1),
        sft_batches(talks, tiny, rows=3, length=420, shuffle=False),
        sft_batches(talks, tiny, rows=3, length=420, packing=False),
        prompt_batches([{"prompt": "x"}], tiny, rows=3, length=420),
    ):
        with pytest.raises(ValueError, match="other data or settings"):
            other.set_state(state)
    with pytest.raises(ValueError, match=r"got the keys \['position'\], wanted"):
        more_epochs.set_state({"position": 1})


def test_cuts_and_drops_are_counted_and_printed(tiny, capsys):
    rows = [
        {"prompt": "hello", "completion": "there"},
        {"prompt": "hello", "completion": "there " * 90},
        {"prompt": "hello " * 90, "completion": "there"},
        {"prompt": "hello " * 91, "completion": "there"},
    ]
    lengths = [len(ids) for ids, _ in expected(tiny, rows)]
    assert sorted(n > 60 for n in lengths) == [False, True, True, True]
    batches = sft_batches(rows, tiny, rows=2, length=60, packing=False, shuffle=False)
    assert batches.stats["read"] == 4
    assert batches.stats["kept"] == 2
    assert batches.stats["cut"] == 1
    assert batches.stats["dropped"] == {"the answer begins beyond 60 tokens": 2}
    assert capsys.readouterr().out == ""
    (batch,) = batches
    printed = capsys.readouterr().out
    assert "4 rows read, 2 kept, 1 cut to 60 tokens, 2 dropped" in printed
    assert "dropped 2: the answer begins beyond 60 tokens" in printed
    list(batches)
    assert capsys.readouterr().out == ""  # once
    assert batches.describe() + "\n" == capsys.readouterr().out == printed
    # The start is kept.
    ((ids, mask),) = expected(tiny, rows[1:2])
    assert batch.inputs[1].tolist() == list(ids[:60])
    assert batch.loss_mask[1].tolist() == [*mask[:59], False]
    assert [e.origin for e in batches.examples] == ["row 1", "row 2"]


def test_nothing_left_is_an_error(tiny):
    rows = [{"prompt": "hello " * 90, "completion": "there"}] * 2
    lengths = len(expected(tiny, rows)[0][0])
    wanted = rf"masks all False\): 2 read, .*have {lengths} to {lengths} tokens.*larger length"
    with pytest.raises(ValueError, match=wanted):
        sft_batches(rows, tiny, rows=2, length=20)
    pairs = [{"prompt": "hello " * 90, "chosen": "there", "rejected": "you"}]
    with pytest.raises(ValueError, match="preference_batches: no row is left"):
        preference_batches(pairs, tiny, rows=2, length=20)


def _side(tok, pair, side):
    text = {"prompt": pair["prompt"], "completion": pair[side]}
    return expected(tok, [text])[0]


def test_unpacked_pairs(tiny, pairs):
    batches = preference_batches(pairs, tiny, rows=4, length=200, shuffle=False)
    assert len(batches) == 6
    rows = []
    for batch in batches:
        assert batch.mask is None
        assert batch.margin.shape == (4,)
        assert batch.margin.dtype == np.float32
        chosen, rejected = documents(batch.chosen), documents(batch.rejected)
        rows += list(zip(chosen, rejected, batch.margin.tolist(), strict=False))
    wanted = [(_side(tiny, p, "chosen"), _side(tiny, p, "rejected"), p["margin"]) for p in pairs]
    assert rows == wanted
    assert not batch.chosen.loss_mask[3].any()
    assert not batch.rejected.loss_mask[3].any()
    bare = [{k: v for k, v in pair.items() if k != "margin"} for pair in pairs]
    assert next(iter(preference_batches(bare, tiny, rows=4, length=200))).margin is None
    with pytest.raises(ValueError, match="row 2: margin: missing"):
        preference_batches([pairs[0], bare[1]], tiny, rows=4, length=200)


def test_packed_pairs_share_row_and_segment(tiny, pairs):
    batches = preference_batches(pairs, tiny, rows=2, length=400, packing=True)
    found, shapes = [], set()
    for batch in batches:
        shapes |= {batch.mask.shape, batch.margin.shape}
        for row in range(2):
            sides = []
            for side in (batch.chosen, batch.rejected):
                sides.append(documents(tuple(leaf[row : row + 1] for leaf in side[:5])))
            count = len(sides[0])
            assert len(sides[1]) == count == batch.mask[row].sum()
            assert batch.mask[row, :count].all()
            found += list(zip(*sides, batch.margin[row, :count].tolist(), strict=True))
    wanted = [(_side(tiny, p, "chosen"), _side(tiny, p, "rejected"), p["margin"]) for p in pairs]
    assert sorted(found) == sorted(wanted)
    assert len(shapes) == 1
    assert batches.stats["rows"] < 23
    bare = [{k: v for k, v in pair.items() if k != "margin"} for pair in pairs]
    assert (
        next(iter(preference_batches(bare, tiny, rows=2, length=400, packing=True))).margin is None
    )


def test_a_pair_is_dropped_when_one_side_keeps_no_answer(tiny):
    pairs = [
        {"prompt": "hello", "chosen": "there " * 90, "rejected": "you"},
        {
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [
                {"role": "user", "content": "a"},
                {"role": "user", "content": "hello " * 90},
                {"role": "assistant", "content": "c"},
            ],
        },
    ]
    batches = preference_batches(pairs, tiny, rows=1, length=60)
    assert batches.stats["cut"] == 1
    assert batches.stats["dropped"] == {"the answer begins beyond 60 tokens": 1}


def test_prompts_are_left_padded_and_found_again(tiny, pairs):
    batches = prompt_batches(pairs, tiny, rows=5, length=80)
    cut, seen = 0, []
    for batch in batches:
        assert batch.tokens.shape == batch.mask.shape == (5, 80)
        for tokens, mask, index in zip(*batch, strict=True):
            if index < 0:
                assert not mask.any()
                continue
            example = batches.examples[index]
            assert example.row == pairs[index]
            ids = encode_prompt(tiny, pairs[index]["prompt"])
            cut += len(ids) > 80
            assert tokens[mask].tolist() == ids[-80:]
            assert mask.tolist() == [False] * (80 - mask.sum()) + [True] * mask.sum()
            seen.append(int(index))
    assert sorted(seen) == list(range(23))
    assert batches.stats["cut"] == cut > 0
    assert batches.stats["kept"] == 23
    last = list(prompt_batches(pairs, tiny, rows=5, length=80))[-1]
    assert sorted(last.index.tolist())[:2] == [-1, -1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"rows": 0}, "rows: got 0, wanted an integer of at least 1"),
        ({"length": 1}, "length: got 1, wanted an integer of at least 2"),
        ({"length": 2.5}, "length: got 2.5"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"epochs": True}, "epochs: got True"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**32}, "seed: got 4294967296, wanted less"),
    ],
)
def test_bad_settings(tiny, talks, options, wanted):
    for make in (sft_batches, preference_batches, prompt_batches):
        with pytest.raises(ValueError, match=wanted):
            make(talks, tiny, **({"rows": 2, "length": 64} | options))


def test_errors_name_file_and_line(tiny, tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": ""}\n')
    with pytest.raises(ValueError, match=r"talks\.jsonl:2: completion: got empty text"):
        sft_batches([file], tiny, rows=2, length=64)


def test_pad_id_does_not_matter(tiny, talks):
    own = copy.deepcopy(tiny)
    before = list(sft_batches(talks, tiny, rows=4, length=420))
    own.pad_token = tiny.eos_token
    after = list(sft_batches(talks, own, rows=4, length=420))
    for a, b in zip(before, after, strict=True):
        assert documents(a) == documents(b)
        assert set(b.inputs[b.segment_ids == 0].tolist()) <= {tiny.eos_token_id}
    own.pad_token = None
    bare = next(iter(sft_batches(talks[:1], own, rows=2, length=420)))
    assert set(bare.inputs[bare.segment_ids == 0].tolist()) == {0}


def test_plain_text_batches(tiny):
    rows = [{"prompt": "hello there", "completion": " you"}]
    (batch,) = sft_batches(rows, tiny, rows=1, length=16, chat_template="none")
    ids = batch.inputs[batch.segment_ids == 1]
    assert tiny.decode(ids) == "hello there you<|im_end|>"
    assert tiny.decode(batch.targets[batch.loss_mask]) == " you<|im_end|>"


def test_real_files(real, shared):
    folder = shared / "data" / "llms-from-scratch"
    tok = real["smollm2"]
    file = folder / "instruction-data.json"
    sft = sft_batches(file, tok, rows=8, length=192, chat_template="chatml")
    found = [document for batch in sft for document in documents(batch)]
    rows = json.loads(file.read_text())
    assert sorted(found) == expected(tok, rows)
    assert sft.stats["fill"] > 0.85
    pairs = preference_batches(
        folder / "instruction-data-with-preference.json", tok, rows=8, length=192
    )
    assert pairs.stats["kept"] == 1100
