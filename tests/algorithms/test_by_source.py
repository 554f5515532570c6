"""Figures by source against a loop over tokens."""

import jax
import numpy as np
import tiny

from jaxalign.algorithms import sft
from jaxalign.algorithms.by_source import by_source, source_of_sequences
from jaxalign.types import TokenBatch


def test_against_a_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 7)).astype(np.float32)
    mask, ids = rng.random((3, 7)) < 0.6, rng.integers(0, 2, (3, 7))
    found = by_source("nll", values, mask, ids, ("a", "b", "none"))
    for number, name in enumerate(("a", "b")):
        kept = [
            v for v, m, i in zip(values.flat, mask.flat, ids.flat, strict=True) if m and i == number
        ]
        np.testing.assert_allclose(found[f"nll/{name}"].mean(), np.mean(kept), rtol=1e-6)
        np.testing.assert_allclose(found[f"share/{name}"].mean(), len(kept) / mask.sum(), rtol=1e-6)
    assert found["share/none"].mean() == found["nll/none"].weight == 0
    assert by_source("nll", values, mask, None, ("a", "b")) == {}
    assert by_source("nll", values, mask, ids, ("a",)) == {}


def test_the_source_of_packed_sequences():
    segments = np.array([[1, 1, 2, 3, 3, 0], [1, 0, 0, 0, 0, 0]], np.int32)
    ids = np.array([[2, 2, 0, 1, 1, 0], [3, 0, 0, 0, 0, 0]], np.int32)
    blank = np.zeros_like(ids)
    tokens = TokenBatch(blank, blank, blank, segments, blank > 0, None, ids)
    assert source_of_sequences(tokens, 3).tolist() == [[2, 0, 1], [3, 0, 0]]
    assert source_of_sequences(tokens, None).tolist() == [2, 3]
    assert source_of_sequences(tokens._replace(source_ids=None), 3) is None


def test_sft_logs_each_source():
    rng = np.random.default_rng(1)
    rows = [tiny.document(rng, 9) for _ in range(4)]
    batch = tiny.token_batch(tiny.lay(rows, tiny.alone(4), 9))
    ids = np.array([0, 1, 1, 0])
    mixed = batch._replace(source_ids=np.repeat(ids[:, None], 9, axis=1).astype(np.int32))
    params = tiny.random_params(tiny.DECODER)
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
