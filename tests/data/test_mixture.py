"""Mixtures: counted row by row; the same under any host count and after a resume."""

import collections
import functools
import itertools
import json

import laid
import numpy as np
import pytest
from laid import documents, expected, same

from jaxalign.data import Source, preference_batches, prompt_batches, sft_batches, unpaired_batches
from jaxalign.data.mixture import apportion, flatten
from jaxalign.data.order import Pool, batches_of, spread


def _rows_of(data):
    return [row for i in range(len(data)) for row in data[i].rows]


def _batches(pools, widths=(8,), sizes=None, **options):
    count = sum(pool.rows for pool in pools)
    sizes = [1] * count if sizes is None else sizes
    options = {"rows": 4, "passes": 3, "seed": 3, "shuffle": True} | options
    return batches_of(pools, sizes, widths=widths, **options)


def test_each_pass_takes_each_pools_share_and_sees_all_of_it_equally_often():
    pools = [Pool(10, 10), Pool(4, 8), Pool(7, 3)]
    rows = _rows_of(_batches(pools, passes=7))
    assert len(rows) == 7 * 21
    for number in range(7):
        seen = rows[number * 21 : (number + 1) * 21]
        counts = collections.Counter(np.searchsorted([10, 14, 21], r, side="right") for r in seen)
        assert counts == {0: 10, 1: 8, 2: 3}
    counts = collections.Counter(rows)
    assert {counts[r] for r in range(10)} == {7}
    assert {counts[r] for r in range(10, 14)} == {14}
    assert {counts[r] for r in range(14, 21)} == {3}  # 7 · 3 draws of 7 rows


def test_pools_take_turns_evenly():
    assert spread([4, 2]).tolist() == [0, 1, 0, 0, 1, 0]
    turns = spread([600, 300, 100])
    for start in range(0, 1000, 50):
        part = np.bincount(turns[start : start + 50], minlength=3)
        assert np.abs(part - [30, 15, 5]).max() <= 1


def test_without_shuffling_the_order_of_the_rows_stays():
    pools = [Pool(4, 4), Pool(2, 2)]
    rows = _rows_of(_batches(pools, shuffle=False, passes=1))
    assert [r for r in rows if r < 4] == [0, 1, 2, 3]
    assert [r for r in rows if r >= 4] == [4, 5]


@pytest.mark.parametrize("shuffle", [True, False])
def test_buckets_hold_every_row_once_a_pass_in_the_narrowest_width(shuffle):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 65, 50).tolist()
    widths = (16, 32, 64)
    data = _batches([Pool(50, 50)], widths, sizes, passes=4, shuffle=shuffle)
    assert len(data) == 4 * 13
    found = [data[i] for i in range(len(data))]
    orders = set()
    for number in range(4):
        part = found[number * 13 : (number + 1) * 13]
        assert sorted(r for chosen in part for r in chosen.rows) == list(range(50))
        assert sum(len(chosen.rows) < 4 for chosen in part) == 1
        for chosen in part:
            fitting = [w for w in widths if w >= max(sizes[r] for r in chosen.rows)]
            assert chosen.width >= fitting[0]
        # At most one batch a width is wider than it must be: the one that took what was left.
        wide = [
            c
            for c in part
            if c.width > min(w for w in widths if w >= max(sizes[r] for r in c.rows))
        ]
        assert len(wide) <= 2
        orders.add(tuple(r for chosen in part for r in chosen.rows))
    assert len(orders) == (4 if shuffle else 1)


def test_endless_orders_have_no_last_batch():
    data = _batches([Pool(5, 5), Pool(3, 9)], passes=None)
    assert len(data[10**9].rows) == 4
    data = _batches([Pool(5, 5)], (4, 8), [3, 3, 5, 5, 5], passes=None)
    assert data[10**9].rows


def test_shares_by_hand():
    assert apportion([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert apportion([0.55, 0.28, 0.17], 10) == [5, 3, 2]
    assert apportion([0.999, 0.001], 10) == [10, 1]  # nothing is left out
    assert flatten([9, 1], 1.0) == pytest.approx([0.9, 0.1])
    assert flatten([9, 1], 2.0) == pytest.approx([0.75, 0.25])
    assert flatten([9, 1], float("inf")) == pytest.approx([0.5, 0.5])


# Whole mixtures of files


@pytest.fixture
def files(tmp_path):
    """40 talks of one turn, 10 others, 5 more, told apart by their first word."""
    for name, count in (("big", 40), ("small", 10), ("least", 5)):
        rows = [{"prompt": f"{name} {n}", "completion": f"yes {n}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("big", "small", "least")}


def _prompts(tok, batches):
    """The first two words of each document, in order."""
    found = []
    for batch in batches:
        for ids, _ in documents(batch):
            said = tok.decode(ids).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            found.append(said)
    return found


def _mix(tok, sources, **options):
    options = {"rows": 5, "length": 64, "packing": False} | options
    return sft_batches(sources, tok, **options)


def test_weights_are_shares_of_the_rows(tiny, files):
    sources = [Source(path=files["big"], weight=1), Source(path=files["small"], weight=3)]
    batches = _mix(tiny, sources, epochs=4)
    said = _prompts(tiny, batches)
    assert len(said) == 4 * 50
    counts = collections.Counter(p.split()[0] for p in said)
    assert counts == {"big": 4 * 13, "small": 4 * 37}  # 12.5 and 37.5: the first goes up
    assert set(collections.Counter(p for p in said if p.startswith("small")).values()) <= {14, 15}
    assert batches.sources == ("big", "small")
    assert batches.stats["sources"]["big"]["read"] == 40
    assert batches.stats["sources"]["small"]["share"] == 37
    for batch in batches:
        for row in range(5):
            name = tiny.decode(batch.inputs[row]).split("user\n")[1].split()[0]
            assert set(batch.source_ids[row][batch.segment_ids[row] > 0]) == {
                batches.sources.index(name)
            }


def test_temperature_flattens(tiny, files):
    paths = [files["big"], files["small"]]
    counts = {}
    for temperature in (1.0, 2.0, float("inf")):
        said = _prompts(tiny, _mix(tiny, paths, temperature=temperature))
        counts[temperature] = collections.Counter(p.split()[0] for p in said)
    assert counts[1.0] == {"big": 40, "small": 10}
    assert counts[2.0] == {"big": 33, "small": 17}  # √40 : √10 = 2 : 1
    assert counts[float("inf")] == {"big": 25, "small": 25}


def test_epochs_and_numbers_of_rows(tiny, files):
    sources = [
        Source(path=files["big"], rows=7),
        Source(path=files["small"], epochs=2.5),
        Source(path=files["least"], rows=12, name="few"),
    ]
    batches = _mix(tiny, sources)
    counts = collections.Counter(_prompts(tiny, batches))
    by_name = collections.Counter(p.split()[0] for p in counts.elements())
    assert by_name == {"big": 7, "small": 25, "least": 12}
    assert {counts[p] for p in counts if p.startswith("big")} == {1}
    assert {counts[p] for p in counts if p.startswith("small")} == {2, 3}
    assert {counts[p] for p in counts if p.startswith("least")} == {2, 3}
    stats = batches.stats["sources"]
    assert stats["big"]["dropped"] == {"not among the 7 rows to be used": 33}
    assert stats["few"]["repeated"] == 7
    for own in stats.values():
        assert own["read"] + own["repeated"] == own["kept"] + sum(own["dropped"].values())
    other = _prompts(tiny, _mix(tiny, sources, seed=1))
    assert {p for p in other if p.startswith("big")} != {p for p in counts if p.startswith("big")}


def test_one_source_has_no_ids(tiny, files):
    assert next(iter(_mix(tiny, files["big"]))).source_ids is None
    assert next(iter(_mix(tiny, [files["big"], files["small"]]))).source_ids is not None


def test_packed_sources_share_rows_unless_weighted(tiny, files):
    batches = _mix(tiny, [files["big"], files["small"]], packing=True, length=100)
    mixed = [
        set(i[s > 0]) for b in batches for i, s in zip(b.source_ids, b.segment_ids, strict=True)
    ]
    assert {0, 1} in mixed
    sources = [Source(path=files[name], weight=1) for name in ("big", "small")]
    batches = _mix(tiny, sources, packing=True, length=100)
    mixed = [
        set(i[s > 0]) for b in batches for i, s in zip(b.source_ids, b.segment_ids, strict=True)
    ]
    assert {0, 1} not in mixed


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], "'b' has none while other sources"),
        ([{"path": "a", "weight": 1, "epochs": 2}], "beside weights"),
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "two sources are called 'x'"),
    ],
)
def test_bad_mixtures(tiny, sources, told):
    with pytest.raises(ValueError, match=told):
        _mix(tiny, [Source(**source) for source in sources])


# Hosts and positions


def _makers(tok):
    talks, pairs = laid.talks(), laid.pairs()
    marked = [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": p["margin"] % 3 == 0}
        for p in pairs
    ]
    common = {"rows": 4, "length": 420, "epochs": 2}
    few = {"rows": 4, "length": 200, "epochs": 4}
    return {
        "packed": lambda **o: sft_batches(talks, tok, **common, **o),
        "buckets": lambda **o: sft_batches(
            talks, tok, packing=False, buckets=[64, 128], **common, **o
        ),
        "mixed": lambda **o: sft_batches(
            [*talks, Source(path=o.pop("file"), epochs=2.0)], tok, **common, **o
        ),
        "streamed": lambda **o: sft_batches(talks, tok, streaming=True, window=8, **common, **o),
        "pairs": lambda **o: preference_batches(pairs, tok, packing=True, **few, **o),
        "shared": lambda **o: preference_batches(
            pairs, tok, packing=True, shared_prefix=True, **few, **o
        ),
        "prompts": lambda **o: prompt_batches(pairs, tok, **common, **o),
        "unpaired": lambda **o: unpaired_batches(marked, tok, **common, **o),
    }


_KINDS = ("packed", "buckets", "mixed", "streamed", "pairs", "shared", "prompts", "unpaired")


def _joined(parts):
    """The batches of all hosts, put together."""
    first = parts[0]
    if isinstance(first, tuple):
        return type(first)(*(_joined(list(leaves)) for leaves in zip(*parts, strict=True)))
    return None if first is None else np.concatenate(parts)


@pytest.mark.parametrize("kind", _KINDS)
def test_hosts_share_batches_and_positions(tiny, tmp_path, kind):
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in laid.talks(6, seed=9)))
    extra = {"file": str(file)} if kind == "mixed" else {}
    make = _makers(tiny)[kind]
    whole = list(make(**extra))
    assert len(whole) > 5
    for count in (2, 4):
        parts = [list(make(host=(index, count), **extra)) for index in range(count)]
        joined = [_joined(list(rows)) for rows in zip(*parts, strict=True)]
        assert len(joined) == len(whole)
        assert all(same(a, b) for a, b in zip(joined, whole, strict=True))
    # Two hosts stop after 3 batches, four go on.
    states = []
    for index in range(2):
        batches = make(host=(index, 2), **extra)
        iterator = iter(batches)
        for _ in range(3):
            next(iterator)
        states.append(json.loads(json.dumps(batches.get_state())))
        batches.close()
    assert states[0] == states[1]
    rest = []
    for index in range(4):
        batches = make(host=(index, 4), **extra)
        batches.set_state(states[0])
        rest.append(list(batches))
    joined = [_joined(list(rows)) for rows in zip(*rest, strict=True)]
    assert len(joined) == len(whole) - 3
    assert all(same(a, b) for a, b in zip(joined, whole[3:], strict=True))


def test_across_hosts_every_row_comes_once_an_epoch(tiny):
    """Counted row by row, also where two hosts stop and four go on."""
    rows = [{"prompt": f"number {i}"} for i in range(22)]

    def numbers(batches):
        return [np.asarray(b.index)[np.asarray(b.mask).any(axis=1)].tolist() for b in batches]

    def hosts(count, **options):
        make = functools.partial(prompt_batches, rows, tiny, rows=4, length=200, epochs=3)
        return [make(host=(index, count), **options) for index in range(count)]

    seen = [[] for _ in range(2)]
    for index, batches in enumerate(hosts(2)):
        iterator = iter(batches)
        seen[index] = numbers(next(iterator) for _ in range(7))
        position = batches.get_state()
        batches.close()
    for batches in hosts(4):
        batches.set_state(position)
        seen.append(numbers(batches))
    assert {len(one) for one in seen[2:]} == {17 - 7}  # 3 × 22 rows, 4 at a time
    given = collections.Counter(itertools.chain.from_iterable(itertools.chain(*seen)))
    assert given == dict.fromkeys(range(22), 3)
    # No row twice before every row has come once, whichever host it is given to.
    first = [row for batch in range(5) for host in seen[:2] for row in host[batch]]
    assert len(first) == len(set(first)) == 20


def test_hosts_must_divide_the_rows(tiny):
    with pytest.raises(ValueError, match="rows: got 5, which 2 hosts do not divide"):
        _mix(tiny, [{"prompt": "a", "completion": "b"}], host=(0, 2))
    with pytest.raises(ValueError, match="host: got"):
        _mix(tiny, [{"prompt": "a", "completion": "b"}], rows=4, host=(2, 2))


def test_batches_made_ahead_are_the_same(tiny):
    talks = laid.talks()
    lists = [
        list(sft_batches(talks, tiny, rows=3, length=420, prefetch=n, streaming=s, window=9))
        for n, s in itertools.product((0, 1, 5), (False, True))
    ]
    for other in lists[2::2]:
        assert all(same(a, b) for a, b in zip(lists[0], other, strict=True))
    for other in lists[3::2]:
        assert all(same(a, b) for a, b in zip(lists[1], other, strict=True))


# Streaming


def test_a_stream_gives_every_row_once_a_pass(tiny, tmp_path):
    talks = laid.talks(50)
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in talks))
    options = {"rows": 3, "length": 420, "streaming": True, "window": 7}
    batches = sft_batches([str(file)], tiny, epochs=2, **options)
    found = [document for batch in batches for document in documents(batch)]
    assert sorted(found) == sorted(expected(tiny, talks) * 2)
    assert batches.stats["read"] == batches.stats["kept"] == 100
    assert batches.stats["tokens"] == sum(len(ids) for ids, _ in found)
    assert batches.stats["fill"] == batches.stats["tokens"] / (batches.stats["rows"] * 420)
    # The order differs from pass to pass, and by the seed.
    assert found[:50] != found[50:]
    other = sft_batches([str(file)], tiny, seed=1, **options)
    assert [d for batch in other for d in documents(batch)] != found[:50]
    with pytest.raises(TypeError, match="no len"):
        len(batches)


def test_a_stream_resumes_at_exactly_the_next_batch(tiny):
    talks = laid.talks(40)

    def make(**options):
        options = {"rows": 2, "length": 420, "window": 6, "epochs": 2} | options
        return sft_batches(talks, tiny, streaming=True, **options)

    whole = list(make())
    for stop in (0, 1, 5, len(whole) - 1, len(whole)):
        first = make()
        iterator = iter(first)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(first.get_state()))
        first.close()
        second = make()
        second.set_state(state)
        rest = list(second)
        assert len(rest) == len(whole) - stop
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))
        assert second.stats == {**make_stats(make)}
    with pytest.raises(ValueError, match="other data or settings"):
        make(window=7).set_state(state)


def make_stats(make):
    """Counts of an uninterrupted stream."""
    batches = make()
    list(batches)
    return batches.stats


def test_streamed_weights(tiny, files):
    sources = [Source(path=files["big"], weight=1), Source(path=files["small"], weight=3)]
    batches = _mix(tiny, sources, streaming=True, window=8, epochs=None)
    iterator = iter(batches)
    said = _prompts(tiny, [next(iterator) for _ in range(16)])
    batches.close()
    assert collections.Counter(p.split()[0] for p in said) == {"big": 20, "small": 60}
    assert set(collections.Counter(p for p in said if p.startswith("small")).values()) == {6}
    with pytest.raises(ValueError, match="epochs: got 1, wanted None when sources with weights"):
        _mix(tiny, sources, streaming=True)


def test_a_stream_without_a_usable_row_is_an_error(tiny, capsys):
    rows = [{"prompt": "hello " * 90, "completion": "there"}] * 3
    with pytest.raises(ValueError, match="no row is left to train on"):
        next(iter(_mix(tiny, rows, streaming=True, length=20)))
    rows.append({"prompt": "a", "completion": "b"})
    batches = _mix(tiny, rows, streaming=True, length=30)
    assert capsys.readouterr().out == ""
    assert len(list(batches)) == 1
    assert "dropped 3: the answer begins beyond 30 tokens" in capsys.readouterr().out
