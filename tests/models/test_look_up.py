"""Looking tokens up: rows of the table forward, sums of gradients backward."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.ops import look_up
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import constrain

IDS = np.array([[0, 6, 6, 2], [5, 2, 9, 0], [1, 1, 1, 1], [3, 4, 5, 6]])  # 9 becomes 6


def gradient(table, weight):
    return jax.jit(jax.grad(lambda table: jnp.sum(weight * look_up(table, jnp.array(IDS)))))(table)


def by_hand():
    table = np.asarray(jax.random.normal(jax.random.key(0), (7, 8)))
    weight = np.asarray(jax.random.normal(jax.random.key(1), (4, 4, 8)))
    want = np.zeros_like(table)
    np.add.at(want, np.minimum(IDS, 6), weight)
    return table, weight, want


def test_rows_and_their_gradient():
    table, weight, want = by_hand()
    np.testing.assert_array_equal(look_up(table, IDS), table[np.minimum(IDS, 6)])
    np.testing.assert_allclose(gradient(table, weight), want, atol=1e-6)


def test_where_rows_and_columns_are_split_over_the_same_devices():
    table, weight, want = by_hand()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        got = gradient(table, constrain(jnp.array(weight), "rows length hidden"))
    np.testing.assert_allclose(got, want, atol=1e-6)
