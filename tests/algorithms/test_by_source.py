"""Figures by source against a loop over tokens."""

import jax
import numpy as np
import tiny

from jaxalign.algorithms import dpo, reward, sft
from jaxalign.algorithms.by_source import figures_by_source, source_of_sequences
from jaxalign.algorithms.loss import Entries
from jaxalign.types import PairBatch, TokenBatch


def test_against_a_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 7)).astype(np.float32)
    mask, ids = rng.random((3, 7)) < 0.6, rng.integers(0, 2, (3, 7))
    found = figures_by_source(Entries("nll", values, mask, ids), ("a", "b", "none"))
    for number, name in enumerate(("a", "b")):
        kept = [
            v for v, m, i in zip(values.flat, mask.flat, ids.flat, strict=True) if m and i == number
        ]
        np.testing.assert_allclose(found[f"nll/{name}"].mean(), np.mean(kept), rtol=1e-6)
        np.testing.assert_allclose(found[f"share/{name}"].mean(), len(kept) / mask.sum(), rtol=1e-6)
    assert found["share/none"].mean() == found["nll/none"].weight == 0
    assert figures_by_source(Entries("nll", values, mask, None), ("a", "b")) == {}
    assert figures_by_source(None, ("a", "b")) == {}


def test_the_source_of_packed_sequences():
    segments = np.array([[1, 1, 2, 3, 3, 0], [1, 0, 0, 0, 0, 0]], np.int32)
    ids = np.array([[2, 2, 0, 1, 1, 0], [3, 0, 0, 0, 0, 0]], np.int32)
    blank = np.zeros_like(ids)
    tokens = TokenBatch(blank, blank, blank, segments, blank > 0, None, ids)
    found = source_of_sequences(tokens, segments, 3)
    assert found[0].tolist() == [2, 0, 1]
    assert found[1, 0] == 3  # that row has no other sequence
    one = (segments == 1).astype(np.int32)
    assert source_of_sequences(tokens, one).tolist() == [[2], [3]]
    assert source_of_sequences(tokens._replace(source_ids=None), segments, 3) is None


def test_sft_logs_each_source():
    rng = np.random.default_rng(1)
    rows = [tiny.document(rng, 9) for _ in range(4)]
    batch = tiny.token_batch(tiny.lay(rows, tiny.alone(4), 9))
    ids = np.array([0, 1, 1, 0])
    mixed = batch._replace(source_ids=np.repeat(ids[:, None], 9, axis=1).astype(np.int32))
    params = tiny.random_params(tiny.DECODER)
    of_one = sft.make_loss(tiny.DECODER, sources=("a",))
    assert jax.eval_shape(of_one.terms, params, mixed)[1] == {}
    loss = sft.make_loss(tiny.DECODER, sources=("a", "b"))
    sums, metrics = jax.jit(loss.terms)(params, mixed)
    plain = jax.jit(sft.make_loss(tiny.DECODER).terms)
    for number, name in enumerate("ab"):
        here = (ids == number)[:, None]
        alone = batch._replace(loss_mask=batch.loss_mask & here)
        part, none = plain(params, alone)
        assert none == {}
        np.testing.assert_allclose(metrics[f"nll/{name}"].total, part["nll"], rtol=1e-5)
    total = metrics["nll/a"].total + metrics["nll/b"].total
    np.testing.assert_allclose(total, sums["nll"], rtol=1e-5)


def test_pairs_log_each_source():
    """The loss of a source is that of its pairs alone, in DPO and for reward models."""
    rng = np.random.default_rng(2)
    sides = [
        tiny.token_batch(tiny.lay([tiny.document(rng, 9) for _ in range(4)], tiny.alone(4), 9))
        for _ in range(2)
    ]
    ids = np.array([1, 0, 0, 1])
    marks = np.repeat(ids[:, None], 9, axis=1).astype(np.int32)
    refs = rng.normal(size=(2, 4)).astype(np.float32)
    mixed = PairBatch(*(side._replace(source_ids=marks) for side in sides), *refs)
    for made, model in ((dpo, tiny.DECODER), (reward, tiny.SCORER)):
        params = tiny.random_params(model)
        loss = made.make_loss(model, sources=("a", "b"))
        sums, metrics = jax.jit(loss.terms)(params, mixed)
        plain = jax.jit(made.make_loss(model).terms)
        for number, name in enumerate("ab"):
            here = (ids == number)[:, None]
            kept = [side._replace(loss_mask=side.loss_mask & here) for side in sides]
            part, _ = plain(params, PairBatch(*kept, *refs))
            found = metrics[f"preference/{name}"]
            np.testing.assert_allclose(found.total, part["preference"], rtol=1e-5)
            assert found.weight == 2
        assert float(sums["preference"]) > 0
