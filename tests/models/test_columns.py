"""Hidden states of some columns only: those of a whole pass, with less work in the last layer."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.hf.families import config_from_hf
from jaxalign.models.base import LoraConfig, combine, read
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import add_lora
from jaxalign.models.scorer import Scorer, pooled_scores
from jaxalign.parallel.mesh import make_mesh
from jaxalign.types import TokenBatch

RNG = np.random.default_rng(4)
ROWS, LENGTH = 4, 16
# Two documents a row, padding; the second has a prompt with two branches behind it.
IDS = np.tile(np.repeat([1, 2, 0], [6, 8, 2]), (ROWS, 1)).astype(np.int32)
BRANCHES = np.tile(np.repeat([0, 0, 1, 2, 0], [6, 3, 2, 3, 2]), (ROWS, 1)).astype(np.int32)
POSITIONS = np.tile([*range(6), 0, 1, 2, 3, 4, 3, 4, 5, 0, 0], (ROWS, 1)).astype(np.int32)
INPUTS = RNG.integers(3, 48, (ROWS, LENGTH)).astype(np.int32)
COLUMNS = np.array([[5, 10, 13], [0, 13, 0], [8, 9, 12], [13, 1, 10]], np.int32)
TOKENS = TokenBatch(INPUTS, INPUTS, POSITIONS, IDS, IDS > 0, branch_ids=BRANCHES)

DENSE = [name for name, keys in families.CASES.items() if "moe" not in name]


def both(model, params, tokens=TOKENS):
    """Values and gradients of a sum over columns, read as such and out of the whole rows."""
    weights = RNG.normal(size=(*COLUMNS.shape, model.config.hidden_size)).astype(np.float32)

    def total(params, whole):
        if whole:
            hidden, _ = read(model, params, tokens)
            hidden = jnp.stack([hidden[b, at] for b, at in enumerate(COLUMNS)])
        else:
            hidden, _ = read(model, params, tokens, COLUMNS)
        assert hidden.shape == (*COLUMNS.shape, model.config.hidden_size)
        return jnp.sum(hidden * weights), hidden

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    return [(hidden, gradient) for (_, hidden), gradient in (run(params, x) for x in (False, True))]


def same(got, want):
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1]))
    for have, value in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(have, value, atol=2e-5 * largest)


@pytest.mark.parametrize("name", DENSE)
def test_every_family(name):
    hf = {"model_type": name, **families.keys(name)}
    model = Decoder(config_from_hf(hf))
    same(*both(model, tiny.random_params(model)))


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_adapters_and_recomputation(remat):
    model = dataclasses.replace(tiny.DECODER, remat=remat)
    start = tiny.random_params(model)
    model, adapters, base = add_lora(model, start, jax.random.key(0), LoraConfig(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # B starts as 0
    same(*both(model, combine(adapters, base)))


def test_rows_over_devices():
    params = tiny.random_params(tiny.DECODER)
    want = both(tiny.DECODER, params)[1]
    for axes in ({"data": 2, "fsdp": 2}, {"data": 1, "fsdp": 2, "sequence": 2}):
        with jax.set_mesh(make_mesh(**axes, devices=jax.devices()[:4])):
            got = jax.device_get(
                jax.jit(lambda params: read(tiny.DECODER, params, TOKENS, COLUMNS)[0])(params)
            )
        np.testing.assert_allclose(got, want[0], atol=2e-5)


def flops(model, params, columns):
    run = jax.jit(lambda params: jnp.sum(read(model, params, TOKENS, columns)[0]))
    return jax.jit(jax.grad(run)).lower(params).compile().cost_analysis()["flops"]


def test_most_of_the_last_layer_is_saved():
    """With one of 16 columns, two layers do a little more work than one and its keys and values."""
    params = tiny.random_params(tiny.DECODER)
    short = Decoder(dataclasses.replace(tiny.CONFIG, num_layers=1))
    one, two, last = (
        flops(short, tiny.random_params(short), None),
        flops(tiny.DECODER, params, None),
        flops(tiny.DECODER, params, COLUMNS[:, :1]),
    )
    # Keys and values: 2·D·16 of the layer's 2·D·16 + 2·D·32 + 3·D·48 multiplications.
    assert one < last < one + 0.4 * (two - one)


def test_all_columns_are_a_whole_pass():
    """Where nothing is left out, the usual attention, which skips half of the pairs, is cheaper."""
    params = tiny.random_params(tiny.DECODER)
    every = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    assert flops(tiny.DECODER, params, every) < 1.02 * flops(tiny.DECODER, params, None)


def test_a_model_without_the_argument_is_read_whole():
    @dataclasses.dataclass(frozen=True)
    class Own:
        def apply(self, params, inputs, positions=None, segment_ids=None, branch_ids=None):
            return tiny.DECODER.apply(params, inputs, positions, segment_ids, branch_ids)

        config = tiny.CONFIG

    same(*both(Own(), tiny.random_params(tiny.DECODER)))


def test_pooled_scores_are_those_of_whole_rows():
    scorer = Scorer(tiny.DECODER)
    params = tiny.random_params(scorer)
    run = jax.jit(functools.partial(pooled_scores, scorer, count=2))
    whole = scorer.scores(params, tiny.DECODER.apply(params, INPUTS, POSITIONS, IDS, BRANCHES))
    np.testing.assert_allclose(run(params, TOKENS), whole[:, [5, 13]], atol=2e-5)
