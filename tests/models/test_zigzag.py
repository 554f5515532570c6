"""Rows in zigzag order: the same results, and as much attention for every device."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.models.attention import flash, kernels
from jaxalign.models.attention.flash_kernels import Tokens
from jaxalign.models.attention.mask import MaskSpec, Segments, make_mask
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.zigzag import from_zigzag, to_zigzag, zigzag_columns


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_order(parts):
    length = 6 * parts
    columns = zigzag_columns(length, parts)
    assert sorted(columns) == list(range(length))
    own = columns.reshape(parts, -1)
    for i, part in enumerate(own):
        late = 2 * parts - 1 - i
        assert part.tolist() == [*range(3 * i, 3 * i + 3), *range(3 * late, 3 * late + 3)]
    mesh = make_mesh(sequence=parts, fsdp=1, devices=jax.devices()[:parts])
    x = np.arange(2 * length * 3).reshape(2, length, 3)
    with jax.set_mesh(mesh):
        split = jax.device_put(x[:, columns], NamedSharding(mesh, PartitionSpec(None, "sequence")))
        np.testing.assert_array_equal(jax.jit(from_zigzag)(split), x)
        np.testing.assert_array_equal(jax.jit(to_zigzag)(x[..., 0]), x[:, columns, 0])


def test_devices_attend_to_equally_many_keys():
    """In rows of one document to 1 % in blocks, where the order of the row gives the last device
    15 times as much as the first."""
    parts, length, block = 8, 8192, 64
    ones = jnp.ones((1, length), jnp.int32)

    def work(columns):
        key = Tokens(jnp.arange(length)[None], ones)
        query = Tokens(jnp.asarray(columns)[None], ones)
        blocks = flash.visible_blocks(query, key, jnp.full(1, length), block, block)
        return np.asarray(blocks).reshape(parts, -1).sum(1)

    before, after = work(np.arange(length)), work(zigzag_columns(length, parts))
    assert before.sum() == after.sum()
    assert before.max() > 13 * before.min()
    assert after.max() < 1.01 * after.min()


@pytest.mark.parametrize(
    ("kind", "length"), [("pallas", 30), pytest.param("splash", 500, marks=pytest.mark.slow)]
)
def test_a_model_gives_the_same(kind, length):
    """A length that nothing divides, and documents across the borders of parts, to 1e-5."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=1, window=length // 4)
    params = tiny.random_params(Decoder(config))
    rng = np.random.default_rng(0)
    ids = rng.integers(3, tiny.VOCAB, (2, length))
    segments, positions = np.zeros((2, 2, length), int)
    cuts = [0, length // 3, length // 2 + 5, length - 4]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts), start=1):
        segments[:, start:stop], positions[:, start:stop] = number, np.arange(stop - start)
    weights = rng.normal(size=(2, length, config.hidden_size)) * (segments > 0)[..., None]

    def run(kind, mesh):
        model = Decoder(config, attention=kind)

        def loss(params):
            return jnp.sum(weights * model.apply(params, ids, positions, segments))

        with jax.set_mesh(mesh):
            used = kernels.zigzag_multiple(kind, length) is not None
            return used, jax.jit(jax.value_and_grad(loss))(params)

    plain, want = run("xla", make_mesh(devices=jax.devices()[:1]))
    used, got = run(kind, make_mesh(fsdp=2, sequence=2, tensor=2))
    assert (plain, used) == (False, True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = jax.device_get((a, b))
        np.testing.assert_allclose(a, b, 0, 1e-5 * max(1, np.abs(b).max()))


def test_which_rows_are_balanced():
    with jax.set_mesh(make_mesh(fsdp=1, sequence=8)):
        multiples = {
            (kind, length): kernels.zigzag_multiple(kind, length)
            for kind in ("xla", "pallas", "splash")
            for length in (100, 1024, 2000, 8192, 20000)
        }
    assert {multiple for (kind, _), multiple in multiples.items() if kind == "xla"} == {None}
    assert {multiple for (kind, _), multiple in multiples.items() if kind == "pallas"} == {16}
    blocks = [multiples["splash", length] for length in (100, 1024, 2000, 8192, 20000)]
    assert blocks == [None, None, 16 * 128, 16 * 512, 16 * 256]
    with jax.set_mesh(make_mesh()):
        assert kernels.zigzag_multiple("pallas", 8192) is None
    assert backend().splash_padding == 1 / 8


def test_no_matrix_is_made_of_it():
    segments = Segments(np.ones((1, 4), np.int32), np.arange(4)[None])
    with pytest.raises(ValueError, match="only kernels take it"):
        make_mask(MaskSpec(segments, segments, zigzag=True))
