"""Filters count what they drop; which rows they drop does not depend on where rows stand."""

import laid
import numpy as np
import pytest

from jaxalign.data import preference_batches, sft_batches
from jaxalign.data.filters import held_out
from jaxalign.data.minhash import NearCopies, jaccard, shingles
from jaxalign.data.scripts import script_share


def _stats(tok, rows, **options):
    return sft_batches(rows, tok, rows=1, length=420, packing=False, **options).stats


def _row(prompt, answer="yes"):
    return {"prompt": prompt, "completion": answer}


def test_exact_copies(tiny):
    rows = [_row("a"), _row("b"), _row("a"), _row("a", "no"), _row("a"), _row("A")]
    stats = _stats(tiny, rows, dedup="exact")
    assert stats["kept"] == 4
    assert stats["dropped"] == {"the same as an earlier row": 2}
    assert _stats(tiny, rows)["kept"] == 6
    pairs = [{"prompt": "a", "chosen": c, "rejected": r} for c, r in ("xy", "yx", "xy")]
    batches = preference_batches(pairs, tiny, rows=1, length=64, dedup="exact")
    assert batches.stats["kept"] == 2


def test_near_copies(tiny):
    long = "the quick brown fox jumps over the lazy dog while nobody at all is looking at it "
    rows = [_row(long), _row(long.upper() + "."), _row("entirely other words"), _row(long)]
    stats = _stats(tiny, rows, dedup="near")
    assert stats["kept"] == 2
    assert stats["dropped"] == {
        "the same as an earlier row": 1,
        "nearly the same as an earlier row": 1,
    }
    assert _stats(tiny, rows, dedup="near", dedup_threshold=1.0)["kept"] == 3


def _plain_grams(text):
    text = " ".join(text.casefold().split())
    return {text[i : i + 5] for i in range(max(len(text) - 4, 1))}


def test_near_copies_against_sets_of_substrings():
    """No text is called a near-copy that is not; of those that are, next to none is missed."""
    rng = np.random.default_rng(0)
    base = [" ".join(rng.choice(laid.WORDS, 30)) for _ in range(40)]
    texts = []
    for text in base:
        words = text.split()
        for changes in (0, 1, 2, 6):
            other = list(words)
            for at in rng.integers(0, len(words), changes):
                other[at] = f"w{rng.integers(1000)}"
            texts.append(" ".join(other))
    near = NearCopies(0.8)
    kept, missed, clear = [], 0, 0
    for text in texts:
        grams = _plain_grams(text)
        best = max(
            (len(grams & other) / len(grams | other) for other in kept),
            default=0.0,
        )
        if near.add(text):
            kept.append(grams)
            missed += best >= 0.8
        else:
            assert best >= 0.8
        clear += best >= 0.8
    assert clear > 40
    assert missed <= 0.05 * clear


def test_shingles_are_those_of_the_text():
    assert len(shingles("abcdef")) == 2
    assert len(shingles("aaaaaaaaaa")) == 1
    assert len(shingles("abc")) == 1
    assert len(shingles("  ")) == 0
    assert jaccard(shingles("Hello   World"), shingles("hello world")) == 1
    a, b = "the lazy dog sleeps", "the lazy dog leaps"
    exact = len(_plain_grams(a) & _plain_grams(b)) / len(_plain_grams(a) | _plain_grams(b))
    assert jaccard(shingles(a), shingles(b)) == pytest.approx(exact)


def test_scripts(tiny):
    assert script_share("Grüße, 42!", ["latin"]) == 1
    assert script_share("你好 hello", ["han"]) == pytest.approx(2 / 7)
    assert script_share("これは日本語", ["kana", "han"]) == 1
    assert script_share("привет", ["latin"]) == 0
    assert script_share("한국어 ελληνικά", ["hangul", "greek"]) == 1
    assert script_share("12 + 3 = 😀", ["thai"]) == 1  # no letters at all
    rows = [
        _row("hello there"),
        _row("你好，世界", "你好"),
        _row("привет", "мир"),
        _row("1 + 1", "2"),
    ]
    stats = _stats(tiny, rows, scripts=["latin", "han"])
    assert stats["kept"] == 3
    assert stats["dropped"] == {"less than 0.5 of the letters latin or han": 1}
    with pytest.raises(ValueError, match="scripts: got 'klingon', wanted some of latin, greek"):
        _stats(tiny, rows, scripts=["klingon"])


def test_what_is_held_out_and_what_is_trained_are_all_rows():
    keys = [f"prompt {n % 300}" for n in range(900)]
    part = held_out(keys, 0.2)
    assert 0.1 < np.mean(part) < 0.3
    assert part[:300] == part[300:600] == part[600:]  # the same key, the same side
    assert held_out(keys[::-1], 0.2) == part[::-1]
    assert held_out(keys[:10], 0.2) == part[:10]  # whatever else there is
    counted = held_out(keys, 100)
    assert 97 <= sum(counted) <= 100  # three rows a key
    assert sum(held_out(keys[:300], 100)) == 100


def test_validation_splits_by_prompt(tiny):
    rows = [_row(f"prompt {n % 20}", f"answer {n}") for n in range(60)]

    def prompts(split):
        options = {"rows": 1, "length": 64, "packing": False, "shuffle": False}
        batches = sft_batches(rows, tiny, validation=0.3, split=split, **options)
        assert sum(batches.stats["dropped"].values()) + batches.stats["kept"] == 60
        return [e.messages[0]["content"] for e in batches.examples]

    train, held = prompts("train"), prompts("validation")
    assert len(train) + len(held) == 60
    assert not set(train) & set(held)
    assert held
    streamed = sft_batches(
        rows, tiny, rows=1, length=64, validation=0.3, streaming=True, window=7, packing=False
    )
    list(streamed)
    assert streamed.stats["kept"] == len(train)


def test_options_that_cannot_go_together(tiny):
    for options, told in (
        ({"split": "validation"}, "split"),
        ({"streaming": True, "dedup": "exact"}, "dedup"),
        ({"streaming": True, "validation": 5}, "validation"),
        ({"streaming": True, "buckets": [64]}, "buckets"),
        ({"dedup": "fuzzy"}, "dedup: got 'fuzzy'"),
        ({"validation": 1.5}, "validation: got 1.5"),
        ({"buckets": [64, 64]}, "buckets: got"),
        ({"buckets": [999]}, "buckets: got the width 999"),
        ({"on_error": "ignore"}, "on_error"),
        ({"temperature": 0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=told):
            _stats(tiny, [_row("a")], **options)
    with pytest.raises(ValueError, match=r"buckets.*without packing"):
        sft_batches([_row("a")], tiny, rows=1, length=64, buckets=[32], packing=True)
    with pytest.raises(ValueError, match="which is no plain text"):
        sft_batches([_row("a")], tiny, rows=1, length=64, packing="wrapped")
    with pytest.raises(ValueError, match="packing: got 'loose'"):
        sft_batches([_row("a")], tiny, rows=1, length=64, packing="loose")
    with pytest.raises(TypeError, match="unexpected keyword"):
        sft_batches([_row("a")], tiny, rows=1, length=64, bukets=[32])
