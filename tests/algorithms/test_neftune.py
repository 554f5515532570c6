"""NEFTune's noise: its size, and that neither layout nor packing changes it."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import jaxalign as ja
from jaxalign.algorithms import sft
from jaxalign.models.embedding_noise import draw_noise
from jaxalign.parallel.sharding import param_shardings
from jaxalign.types import EmbeddingNoise

LENGTHS = (3, 12, 5, 9, 13, 4, 7, 10)
CONFIG = sft.Config(neftune_alpha=5.0)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [tiny.document(rng, length, prompt=1) for length in LENGTHS]


def noisy(documents, groups, length, seed=(7, 1), **options):
    return sft.add_noise(
        tiny.token_batch(tiny.lay(documents, groups, length, **options)), CONFIG, seed
    )


def by_document(batch, count):
    """Noise of each document, [length, D], whatever row it lies in; documents differ in length."""
    drawn = np.asarray(draw_noise(batch.noise, 32))
    found = {}
    for row, ids in enumerate(np.asarray(batch.segment_ids)):
        for segment in set(ids) - {0}:
            one = drawn[row, ids == segment]
            found[len(one)] = one
    assert len(found) == count
    return found


def test_padding_packing_and_order_change_no_noise(documents):
    plain = by_document(noisy(documents, tiny.alone(8), 13), 8)
    for groups, length, options in (
        (tiny.alone(8, 12), 20, {"left": True}),
        ([[4, 0], [1, 5], [7, 2], [6, 3]], 17, {}),
    ):
        other = by_document(noisy(documents, groups, length, **options), 8)
        for size, want in plain.items():
            np.testing.assert_array_equal(other[size], want)
    other = by_document(noisy(documents, tiny.alone(8), 13, seed=(7, 2)), 8)
    assert all(not np.any(other[size] == want) for size, want in plain.items())


def test_noise_is_uniform_in_the_bounds_of_the_paper(documents):
    for size, noise in by_document(noisy(documents, tiny.alone(8), 13), 8).items():
        bound = 5 / np.sqrt(size * 32)
        assert 0.9 * bound < np.abs(noise).max() <= bound
        assert len(np.unique(noise)) > 0.99 * noise.size
    # 2,016 numbers scaled to ± 1: mean 0 and variance 1/3, within four standard errors.
    scaled = np.concatenate(
        [
            (x / (5 / np.sqrt(size * 32))).ravel()
            for size, x in by_document(noisy(documents, tiny.alone(8), 13), 8).items()
        ]
    )
    assert abs(scaled.mean()) < 4 * np.sqrt(1 / 3 / scaled.size)
    assert abs((scaled**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / scaled.size)


def test_padding_has_none_and_none_is_none(documents):
    batch = noisy(documents, tiny.alone(8), 13)
    drawn = np.asarray(draw_noise(batch.noise, 32))
    assert not drawn[np.asarray(batch.segment_ids) == 0].any()
    plain = batch._replace(noise=None)
    assert sft.add_noise(plain, sft.Config(), (0,)) is plain


def test_the_model_adds_it_to_its_embeddings():
    params = tiny.random_params(tiny.DECODER)
    inputs = np.random.default_rng(1).permutation(tiny.VOCAB)[None, :24].astype(np.int32)
    rng = np.random.default_rng(2)
    noise = EmbeddingNoise(
        rng.integers(0, 2**32, inputs.shape).astype(np.uint32), np.full(inputs.shape, 3, np.float32)
    )
    got = tiny.DECODER.apply(params, inputs, noise=noise)
    table = np.array(params["embed"]["embedding"])  # every token occurs once
    table[inputs[0]] += np.asarray(draw_noise(noise, 32))[0]
    moved = params | {"embed": {"embedding": table}}
    np.testing.assert_allclose(got, tiny.DECODER.apply(moved, inputs), 1e-5, 1e-5)


def test_devices_and_micro_batches_change_no_step(documents):
    model, tx = tiny.DECODER, ja.make_optimizer(ja.OptimizerConfig(learning_rate=1e-2))
    params = tiny.random_params(model)
    batch = noisy(documents, tiny.alone(8, 16), 13)
    _, want = jax.jit(sft.make_step(model, tx, CONFIG))(ja.init_state(params, tx), batch)
    mesh = ja.make_mesh(2, 2, 2)
    state = ja.init_state(
        jax.device_put(params, param_shardings(model.axes, mesh, model.shapes)), tx
    )
    step = sft.make_step(model, tx, CONFIG, micro_batches=2)
    _, got = ja.compile_step(step, state, mesh)(state, batch)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[name], want[name], 2e-6, err_msg=name)


def test_shards_of_the_noise_are_those_of_the_whole(documents):
    noise = noisy(documents, tiny.alone(8), 13).noise
    rows = NamedSharding(ja.make_mesh(1, 8, 1), PartitionSpec("fsdp"))
    drawn = jax.jit(lambda x: draw_noise(x, 32), out_shardings=rows)(jax.device_put(noise, rows))
    np.testing.assert_array_equal(drawn, draw_noise(noise, 32))


def test_an_alpha_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"neftune_alpha=0\.0: wanted a positive number, or null"):
        sft.Config(neftune_alpha=0.0)
