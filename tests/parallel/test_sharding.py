"""Meshes, logical axes, compiled steps: shardings that fit, and errors for those that do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import init_state, opt_state_shardings
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.rules import RULES
from jaxalign.parallel.shard_map import fold_length, unfold_length
from jaxalign.parallel.sharding import (
    constrain,
    mesh_of,
    param_shardings,
    partition_spec,
    row_axes,
    row_shards,
    shard_batch,
    use_mesh,
)
from jaxalign.types import TrainState


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"tensor": 4}, (1, 2, 4)),
    ],
    ids=str,
)
def test_minus_one_takes_the_rest(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert row_shards(mesh) == shape[0] * shape[1]


def test_mesh_of_given_devices():
    mesh = make_mesh(devices=jax.devices()[:2])
    assert mesh.size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data=3 .*3 does not divide the 8 devices.*divides 8"),
        ({"data": 2, "fsdp": 2, "tensor": 1}, r"wants 4 devices, there are 8.*-1"),
        ({"data": -1, "fsdp": -1}, r"data and fsdp are both -1"),
        ({"tensor": 0}, r"tensor=0: wanted a positive integer"),
        ({"fsdp": -2}, r"fsdp=-2"),
        ({"data": 2.0}, r"data=2\.0"),
    ],
    ids=str,
)
def test_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_logical_axes_become_mesh_axes():
    assert partition_spec("layers embed mlp") == PartitionSpec(None, "fsdp", "tensor")
    rows = ("data", "fsdp", "expert")
    assert partition_spec("rows length hidden") == PartitionSpec(rows, "sequence", None)
    small = make_mesh(data=2, fsdp=4)
    assert partition_spec("rows length expert", mesh=small) == PartitionSpec(
        ("data", "fsdp"), None, None
    )
    assert partition_spec("embed heads/8") == PartitionSpec("fsdp", "tensor")
    assert partition_spec("norm") == PartitionSpec(None)
    rules = dict(RULES) | {"embed": None, "mlp": ("fsdp", "tensor")}
    assert partition_spec("embed mlp", rules) == PartitionSpec(None, ("fsdp", "tensor"))
    with pytest.raises(
        ValueError, match=r"unknown logical axis 'width' in 'width mlp'; known: .*mlp"
    ):
        partition_spec("width mlp")
    with pytest.raises(ValueError, match="'mlp heads' map to mesh axis 'tensor' twice"):
        partition_spec("mlp heads")


def test_parameter_that_does_not_divide_is_refused():
    axes = {"blocks": {"kernel": "embed mlp"}}
    shapes = {"blocks": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}}
    with pytest.raises(
        ValueError,
        match=r"blocks.*kernel.*\(8, 6\): axis 'mlp' has size 6.*tensor=4.*\[1, 2, 3, 6\]",
    ):
        param_shardings(axes, make_mesh(tensor=4), shapes)
    fine = param_shardings(axes, make_mesh(tensor=2), shapes)
    assert fine["blocks"]["kernel"].spec == PartitionSpec("fsdp", "tensor")


def test_heads_and_experts_that_do_not_divide_are_refused():
    config = dataclasses.replace(tiny.CONFIG, num_heads=6, num_experts=6, experts_per_token=2)
    model = Decoder(config)
    with pytest.raises(
        ValueError,
        match=r"attention.*axis 'heads' has 6 parts of 8, .*tensor=4 does not.*\[1, 2, 3, 6\]",
    ):
        param_shardings(model.axes, make_mesh(tensor=4), model.shapes)
    with pytest.raises(
        ValueError, match=r"mlp.*axis 'expert' has size 6, .*expert=4 does not.*\[1, 2, 3, 6\]"
    ):
        param_shardings(model.axes, make_mesh(expert=4), model.shapes)


def test_axes_for_long_rows_and_for_experts():
    mesh = make_mesh(sequence=2, expert=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "sequence": 2, "tensor": 1}
    assert row_shards(mesh) == 4
    assert row_axes(mesh) == "data × fsdp × expert"
    with pytest.raises(ValueError, match=r"sequence=3: 3 does not divide the 8 devices"):
        make_mesh(sequence=3)
    x = np.arange(4 * 13 * 3, dtype=np.float32).reshape(4, 13, 3)
    with jax.set_mesh(mesh):
        folded = jax.jit(fold_length)(x)
        back = jax.jit(lambda x: unfold_length(fold_length(x), 13))(x)
    assert folded.sharding.spec[0] == ("sequence", "fsdp", "expert")
    np.testing.assert_array_equal(folded[:4], x[:, :7])
    np.testing.assert_array_equal(folded[4:, :6], x[:, 7:])
    np.testing.assert_array_equal(back, x)
    assert fold_length(x) is x


def test_every_parameter_of_the_models_has_a_layout():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for model in (tiny.DECODER, tiny.SCORER):
        layout = param_shardings(model.axes, mesh, model.shapes)
        assert jax.tree.structure(layout) == jax.tree.structure(model.shapes)


def test_constrain_needs_no_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, "rows length") is x
    mesh = make_mesh(data=2, fsdp=4)
    with use_mesh(mesh):
        spread = jax.jit(lambda x: constrain(2 * x, "rows length"))(x)
    assert spread.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 2)
    assert mesh_of({"a": np.ones(1), "b": spread}) == mesh
    assert mesh_of({"a": x}) is None


def test_batches_are_split_by_rows():
    mesh = make_mesh(data=4, tensor=2)
    placed = shard_batch({"ids": np.arange(24).reshape(8, 3), "none": None}, mesh)
    assert placed["ids"].sharding.shard_shape((8, 3)) == (2, 3)
    assert shard_batch(placed, mesh)["ids"] is placed["ids"]
    with pytest.raises(ValueError, match=r"\['ids'\] has 6 rows.*data × fsdp = 4.*multiple of 4"):
        shard_batch({"ids": np.zeros((6, 3))}, mesh)


def test_optimizer_state_is_sharded_like_its_parameters():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    layout = param_shardings(tiny.DECODER.axes, mesh)
    params = jax.device_put(tiny.random_params(tiny.DECODER), layout)
    tx = optax.partition(
        {"slow": optax.adam(1e-4), "fast": optax.sgd(1e-2, momentum=0.9)},
        {name: "fast" if name == "norm" else "slow" for name in params},
    )
    state = init_state(params, tx)
    inner = state.opt_state.inner_states
    adam = inner["slow"].inner_state[0]
    for moment in (adam.mu, adam.nu):
        assert (
            moment["blocks"]["mlp"]["up"]["kernel"].sharding
            == layout["blocks"]["mlp"]["up"]["kernel"]
        )
        assert moment["embed"]["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert adam.count.sharding == NamedSharding(mesh, PartitionSpec())
    # Factored statistics differ in shape from their parameter and are replicated.
    factored = opt_state_shardings(params, optax.adafactor(1e-3, min_dim_size_to_factor=8))
    assert all(isinstance(x, NamedSharding) for x in jax.tree.leaves(factored))
    with pytest.raises(ValueError, match="lie on no mesh"):
        opt_state_shardings(jax.tree.map(np.asarray, params), tx)


def double(state, batch):
    params = jax.tree.map(lambda x: x + jnp.mean(batch["x"]), state.params)
    return TrainState(state.step + 1, params, state.frozen, state.opt_state), {"n": state.step}


def test_compiled_step_uses_the_states_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    kernel = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    state = init_state({"kernel": kernel}, optax.sgd(1.0))
    step = compile_step(double, state)
    assert step.mesh == mesh
    for _ in range(3):
        state, metrics = step(state, {"x": np.ones((4, 2), np.float32)})
    np.testing.assert_array_equal(state.params["kernel"], 4 * np.ones((4, 4)))
    assert state.params["kernel"].sharding == kernel.sharding
    assert int(metrics["n"]) == 2
    assert step.compiles == 1
    with pytest.raises(ValueError, match=r"data=1 × fsdp=8 .*another mesh, data=2 × fsdp=2"):
        compile_step(double, state, make_mesh(fsdp=8))
    assert "HloModule" in step.lower(state, {"x": np.ones((4, 2))}).compile().as_text()


def test_state_off_the_mesh_is_replicated():
    state = init_state({"kernel": jnp.ones(3)}, optax.sgd(1.0))
    step = compile_step(double, state)
    assert dict(step.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    state, _ = step(state, {"x": np.ones((8, 1))})
    assert len(state.params["kernel"].sharding.device_set) == 8


def test_sizes_that_split_a_physical_axis(monkeypatch):
    """64 of 8 × 16 × 16 chips: JAX needs `allow_split_physical_axes`."""

    def refuse(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh(data=2, fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3
