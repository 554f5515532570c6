"""Rows with branches: every continuation as if it alone followed the shared part."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from jaxalign.models.base import RopeConfig
from jaxalign.models.decoder import Decoder

WINDOWED = dataclasses.replace(
    tiny.CONFIG,
    window=4,
    window_layers=(True, False),
    local_rope=RopeConfig(theta=100.0),
)


@pytest.mark.parametrize("config", [tiny.CONFIG, WINDOWED], ids=["plain", "windows"])
def test_branches_do_not_see_each_other(config):
    model = Decoder(config)
    params = tiny.random_params(model)
    run = jax.jit(model.apply)
    rng = np.random.default_rng(4)
    shared, first, second, other = (rng.integers(3, tiny.VOCAB, n) for n in (6, 5, 4, 3))
    size = 20
    row = np.zeros((4, size), np.int32)  # ids, positions, segments, branches
    columns = [
        (shared, 0, 1, 0),
        (first, 6, 1, 1),
        (second, 6, 1, 2),
        (other, 0, 2, 0),
    ]
    start, places = 0, []
    for ids, position, segment, branch in columns:
        here = slice(start, start + len(ids))
        row[:2, here] = ids, position + np.arange(len(ids))
        row[2:, here] = [[segment], [branch]]
        places.append(here)
        start += len(ids)
    got = np.asarray(run(params, *(x[None] for x in row)))[0]
    for documents, here in (([shared], [0]), ([shared, first], [0, 1]), ([shared, second], [0, 2])):
        ids = np.concatenate(documents)
        alone = np.zeros((3, size), np.int32)
        alone[:, : len(ids)] = ids, np.arange(len(ids)), np.ones(len(ids))
        want = np.asarray(run(params, *(x[None] for x in alone)))[0, : len(ids)]
        together = np.concatenate([got[places[i]] for i in here])
        np.testing.assert_allclose(together, want, 1e-4, 1e-4)
