"""Speculation: the answers of plain decoding in fewer steps, and their distribution."""

import dataclasses
import itertools

import jax
import numpy as np
import plain_llama
import pytest
import scipy.stats
import tiny

from jaxalign.models.decoder import Decoder
from jaxalign.parallel.mesh import make_mesh
from jaxalign.sampling import speculate
from jaxalign.sampling.generate import sample
from jaxalign.types import PromptBatch

KEY = jax.random.key(3)
SIX = Decoder(dataclasses.replace(tiny.CONFIG, vocab_size=6))
"""Six tokens: nearly every pair of them occurs in a prompt of 24, so nearly every step drafts."""


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(SIX)


@pytest.fixture(autouse=True)
def free_drafts(monkeypatch):
    """Drafts cost nothing, so that small models use them on a CPU too."""
    free = dataclasses.replace(speculate.backend(), decode_free_tokens=10**6)
    monkeypatch.setattr(speculate, "backend", lambda: free)


def prompts(lengths, width=24):
    rng = np.random.default_rng(2)
    mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
    tokens = np.where(mask, rng.integers(0, 6, mask.shape), 0).astype(np.int32)
    return PromptBatch(tokens, mask, np.arange(len(lengths), dtype=np.int32))


BATCH = prompts((24, 1, 9, 17, 24, 2, 0, 20))


def both(params, batch=BATCH, **options):
    options = {"max_new_tokens": 40} | options
    plain = sample(SIX, params, batch, KEY, **options)
    return plain, sample(SIX, params, batch, KEY, **options, speculate=4)


def same(plain, drafted):
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(drafted, name), getattr(plain, name))
    np.testing.assert_allclose(drafted.logprobs, plain.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.4, "top_k": 3},
        {"stop_tokens": (4,), "pad_token": 5},
        {"samples": 2, "top_p": 0.8},
        {"lengths": np.array([40, 1, 2, 3, 33, 40, 7, 12])},
        {"max_new_tokens": 1},
        {"max_new_tokens": 70, "temperature": 0.2},  # several stages of the cache
    ],
    ids=str,
)
def test_the_answers_are_those_of_plain_decoding(params, options):
    plain, drafted = both(params, **options)
    same(plain, drafted)
    longest = int(np.asarray(plain.mask).sum(1).max())
    assert int(drafted.steps) <= longest - 1  # the first token comes with the prompt


def test_text_that_repeats_takes_fewer_steps(params):
    plain, drafted = both(params, temperature=0.0)
    same(plain, drafted)
    # Greedy answers of so small a model end in loops: five tokens a step from then on.
    assert int(drafted.steps) < 25 < int(plain.steps) == 40


def test_rows_over_devices(params):
    mesh = make_mesh(data=4, fsdp=1, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        whole = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P()))
    plain = sample(SIX, params, BATCH, KEY, max_new_tokens=40)
    same(plain, sample(SIX, whole, BATCH, KEY, max_new_tokens=40, speculate=3))


def test_watched_answers_are_the_same(params):
    seen = []
    plain, _ = both(params)
    got = sample(
        SIX, params, BATCH, KEY, max_new_tokens=40, speculate=4,
        watch=lambda tokens, counts: seen.append((tokens, counts)),
    )  # fmt: skip
    same(plain, got)
    assert len(seen) > 2
    for tokens, counts in seen:
        for row, count in enumerate(counts):
            np.testing.assert_array_equal(tokens[row][:count], plain.tokens[row][:count])


def test_the_distribution_of_three_tokens(params):
    """χ² of 4,096 answers to one prompt, against probabilities from plain numpy."""
    rows, prompt = 4096, BATCH.tokens[0]
    batch = PromptBatch(
        np.tile(prompt, (rows, 1)), np.ones((rows, 24), bool), np.arange(rows, dtype=np.int32)
    )
    out = sample(SIX, params, batch, KEY, max_new_tokens=3, speculate=2)
    assert int(out.steps) < 3
    wanted = np.ones((6, 6, 6))
    for length in range(3):
        for prefix in itertools.product(range(6), repeat=length):
            ids = np.concatenate([prompt, np.array(prefix, np.int32)])
            logits = plain_llama.logits(SIX.config, params, ids)[-1].astype(np.float64)
            probs = np.exp(logits - logits.max())
            probs = (probs / probs.sum()).reshape((6,) + (1,) * (2 - length))
            wanted[prefix] *= probs
    np.testing.assert_allclose(wanted.sum(), 1, rtol=1e-6)
    cells = np.ravel_multi_index(np.asarray(out.tokens).T, (6, 6, 6))
    counts, expected = np.bincount(cells, minlength=216), rows * wanted.ravel()
    rare = expected < 5  # one cell together: χ² wants five in each
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) > 50
    assert statistic < scipy.stats.chi2.ppf(0.999, len(counts) - 1)


def test_lookup_by_hand():
    text = np.array(
        [
            [7, 7, 1, 2, 3, 4, 5, 1, 2, 3, 0, 0],  # 1 2 3 came before 4 5
            [9, 8, 5, 5, 9, 8, 6, 4, 9, 8, 0, 0],  # only 9 8 did, the last time before 6
            [0, 0, 1, 2, 1, 2, 1, 2, 1, 2, 0, 0],  # a loop goes on
            [3, 4, 7, 1, 2, 5, 6, 7, 3, 4, 0, 0],  # 3 4 is outside this row's text
        ],
        np.int32,
    )
    begin, end = np.array([0, 0, 2, 2]), np.array([10, 10, 10, 10])
    drafts, found = speculate.look_up(text, begin, end, 4)
    np.testing.assert_array_equal(found, [True, True, True, False])
    np.testing.assert_array_equal(drafts[0], [4, 5, 1, 2])
    np.testing.assert_array_equal(drafts[1], [6, 4, 9, 8])
    np.testing.assert_array_equal(drafts[2], [1, 2, 1, 2])


def test_drafts_are_used_where_they_pay(monkeypatch):
    """With n₀ = 8, four rows and k = 4, a step of 20 tokens costs 28/12 of one of 4."""
    costs = dataclasses.replace(speculate.backend(), decode_free_tokens=8)
    monkeypatch.setattr(speculate, "backend", lambda: costs)
    live, found = np.ones(4, bool), np.array([True, True, True, False])
    for rate, want in ((1.7, False), (1.8, True)):  # (4 + 3·rate)/4 against 2.33: 1.78
        assert bool(speculate._worthwhile(live, found, np.float32(rate), 4)) == want
    assert not speculate._worthwhile(live, ~live, np.float32(4), 4)


@pytest.mark.parametrize("options", [{"slots": 4}, {"keep_experts": True}, {"speculate": -1}])
def test_what_speculation_does_not_go_with(params, options):
    with pytest.raises(ValueError, match="speculate="):
        sample(SIX, params, BATCH, KEY, max_new_tokens=4, **({"speculate": 2} | options))
