"""Each optimizer against a numpy loop: on one device, on eight, with layers stacked or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxalign as ja
from jaxalign.algorithms.averages import averaged_params
from jaxalign.algorithms.optim import OPTIMIZERS, OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import opt_state_shardings
from jaxalign.parallel.mesh import make_mesh

STEPS, LAYERS, RATE, DECAY = 20, 2, 2e-3, 0.1
# Adafactor factors the kernel alone: both sides have 128 entries or more.
SHAPES = {
    "embed/embedding": (24, 128),
    "blocks/up/kernel": (LAYERS, 128, 136),
    "blocks/up/bias": (LAYERS, 136),
    "blocks/norm/scale": (LAYERS, 128),
    "head/kernel": (128, 24),
}
SPECS = {
    "embed/embedding": PartitionSpec("tensor", "fsdp"),
    "blocks/up/kernel": PartitionSpec(None, "fsdp", "tensor"),
    "blocks/up/bias": PartitionSpec(None, "tensor"),
    "blocks/norm/scale": PartitionSpec(),
    "head/kernel": PartitionSpec("fsdp", "tensor"),
}


def nested(flat):
    """`{"a/b": x}` → `{"a": {"b": x}}`."""
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def draw(seed, *lead):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(*lead, *shape)).astype(np.float32) for k, shape in SHAPES.items()}


START = {k: 0.05 * x for k, x in draw(0).items()}
# Gradients of one weight keep their size, and those of different weights differ.
SIZES = {k: 0.01 * np.exp(x) for k, x in draw(1).items()}
GRADS = {k: SIZES[k] * x for k, x in draw(2, STEPS).items()}


def config(name, **options):
    options = {"schedule": "linear", "total_steps": 30, "end_fraction": 0.1} | options
    if name == "schedule_free":
        options = {k: v for k, v in options.items() if k not in ("schedule", "end_fraction")}
    return OptimizerConfig(
        name=name, learning_rate=RATE, warmup_steps=4, weight_decay=DECAY, max_grad_norm=None,
        **options,
    )  # fmt: skip


def rate_at(name, step):
    """Of update `step`, from 0: a rise over 4, then constant or a straight line to a tenth."""
    if step < 4 or name == "schedule_free":
        return RATE * min(1, step / 4)
    return RATE * (1 - 0.9 * (step - 4) / 26)


# The loops: float64, layer by layer, one function an optimizer.


class Adam:
    """β₁ = 0.9, β₂ = 0.999, ε = 1e-8."""

    def __init__(self, b1=0.9):
        self.b1, self.m, self.v = b1, 0.0, 0.0

    def __call__(self, g, t):
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = 0.999 * self.v + 0.001 * g**2
        first = 1 - self.b1**t if self.b1 else 1
        return self.m / first / (np.sqrt(self.v / (1 - 0.999**t)) + 1e-8)


class Lion:
    def __init__(self):
        self.m = 0.0

    def __call__(self, g, t):
        update = np.sign(0.9 * self.m + 0.1 * g)
        self.m = 0.999 * self.m + 0.001 * g
        return update


class Momentum:
    def __init__(self):
        self.m = 0.0

    def __call__(self, g, t):
        self.m = 0.95 * self.m + g
        return self.m


class Adafactor:
    def __init__(self):
        self.rows, self.columns, self.v = 0.0, 0.0, 0.0

    def __call__(self, g, t):
        beta, square = 1 - t**-0.8, g**2 + 1e-30
        if g.ndim == 2 and min(g.shape) >= 128:
            self.rows = beta * self.rows + (1 - beta) * square.mean(1)
            self.columns = beta * self.columns + (1 - beta) * square.mean(0)
            v = np.outer(self.rows, self.columns) / self.rows.mean()
        else:
            v = self.v = beta * self.v + (1 - beta) * square
        update = g / np.sqrt(v)
        return update / max(1, np.sqrt((update**2).mean()))


class Muon:
    def __init__(self, rms=0.2):
        self.m, self.rms = 0.0, rms

    def __call__(self, g, t):
        self.m = 0.95 * self.m + 0.05 * g
        x = 0.95 * self.m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        fan_in, fan_out = g.shape
        if self.rms is None:
            return x * np.sqrt(max(1, fan_out / fan_in))
        return x * self.rms * np.sqrt(max(fan_in, fan_out))


def rule(name, path):
    """A fresh optimizer of one matrix or vector."""
    if name == "muon":
        return Muon() if path == "blocks/up/kernel" else Adam()
    kinds = {"adamw": Adam, "lion": Lion, "adafactor": Adafactor, "sgd": Momentum}
    return Adam(b1=0.0) if name == "schedule_free" else kinds[name]()


def by_hand(name, path, start, grads, make=rule):
    """The weights after all updates, and their average of a schedule-free optimizer."""
    if path.startswith("blocks") and start.ndim == len(SHAPES[path]):
        layers = [by_hand(name, path, start[i], grads[:, i], make) for i in range(LAYERS)]
        return tuple(np.stack(part) for part in zip(*layers, strict=True))
    y = z = x = start.astype(np.float64)
    update, decay, weights = make(name, path), DECAY, 0.0
    if path.endswith(("bias", "scale")):
        decay = 0.0
    for t, grad in enumerate(grads.astype(np.float64), start=1):
        rate = rate_at(name, t - 1)
        step = rate * (update(grad, t) + decay * y)
        if name != "schedule_free":
            y = y - step
            continue
        z = z - step
        weights += rate**2  # the largest rate so far, squared: here each is the largest
        share = rate**2 / weights if weights else 0.0
        x = (1 - share) * x + share * z
        y = 0.9 * x + 0.1 * z
    return y, x


@functools.cache
def expected(name):
    return {path: by_hand(name, path, START[path], GRADS[path]) for path in SHAPES}


def run(tx, start, grads, shardings=None):
    """All updates in one program: the train state after them."""
    params = start if shardings is None else jax.device_put(start, shardings)
    state = ja.init_state(params, tx)

    @jax.jit
    def loop(state, grads):
        def step(state, grads):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return state._replace(params=params, opt_state=opt_state), None

        return jax.lax.scan(step, state, grads)[0]

    return loop(state, grads)


def flat(tree):
    return {"/".join(k.key for k in path): x for path, x in jax.tree.leaves_with_path(tree)}


def on_mesh():
    mesh = make_mesh(1, 4, 2)
    return nested({k: NamedSharding(mesh, spec) for k, spec in SPECS.items()})


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_updates_equal_a_numpy_loop(name, devices):
    tx = make_optimizer(config(name))
    layout = on_mesh() if devices == 8 else None
    state = run(tx, nested(START), nested(GRADS), layout)
    got, averages = flat(state.params), flat(averaged_params(state))
    for path, (want, average) in expected(name).items():
        assert np.abs(want - START[path]).max() > 2e-3  # it has moved by 2,000 times the tolerance
        np.testing.assert_allclose(got[path], want, rtol=0, atol=1e-6, err_msg=path)
        average = average if name == "schedule_free" else want
        np.testing.assert_allclose(averages[path], average, rtol=0, atol=1e-6, err_msg=path)
        if devices == 8:
            assert got[path].sharding.is_equivalent_to(flat(layout)[path], got[path].ndim)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_layers_that_are_not_stacked_are_updated_alike(name):
    def unstacked(tree, axis):
        return nested(
            {
                path.replace("blocks", f"blocks/{layer}"): x.take(layer, axis)
                if path.startswith("blocks")
                else x
                for path, x in tree.items()
                for layer in range(LAYERS)
            }
        )

    tx = make_optimizer(config(name))
    got = flat(run(tx, unstacked(START, 0), unstacked(GRADS, 1)).params)
    stacked = flat(run(tx, nested(START), nested(GRADS)).params)
    for path, want in stacked.items():
        for layer in range(LAYERS):
            here = path.replace("blocks", f"blocks/{layer}")
            one = want[layer] if path.startswith("blocks") else want
            np.testing.assert_allclose(got[here], one, rtol=0, atol=1e-6, err_msg=here)


def test_muon_with_the_scale_of_its_author():
    tx = make_optimizer(config("muon", muon_rms=None))
    path, grads = "blocks/up/kernel", {k: x[:5] for k, x in GRADS.items()}
    got = flat(run(tx, nested(START), nested(grads)).params)[path]
    want, _ = by_hand("muon", path, START[path], grads[path], lambda *_: Muon(rms=None))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_sharded_as_the_weights(name):
    layout = on_mesh()
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nested(START),
        layout,
    )
    tx = make_optimizer(config(name, ema=None if name == "schedule_free" else 0.99))
    shapes = jax.tree.leaves_with_path(jax.eval_shape(tx.init, params))
    places = jax.tree.leaves(opt_state_shardings(params, tx))
    kernels = [
        (leaf.shape, place.spec)
        for (path, leaf), place in zip(shapes, places, strict=True)
        if "kernel" in str(path[-1]) and "blocks" in str(path) and leaf.size > LAYERS
    ]
    whole = ((LAYERS, 128, 136), SPECS["blocks/up/kernel"])
    factored = [
        ((LAYERS, 128), PartitionSpec(None, "fsdp")),
        ((LAYERS, 136), PartitionSpec(None, "tensor")),
    ]
    moments = {"adamw": 2, "schedule_free": 2, "adafactor": 0}.get(name, 1)
    average = [] if name == "schedule_free" else [whole]
    want = average + [whole] * moments + (factored if name == "adafactor" else [])
    assert sorted(kernels, key=str) == sorted(want, key=str)


@pytest.mark.parametrize("name", ["adafactor", "muon", "schedule_free"])
def test_the_guard_keeps_every_state(name):
    loss = ja.Loss(
        lambda batch: {"fit": jnp.float32(1)},
        lambda params, batch: ({"fit": jnp.sum(params["up"]["kernel"] ** 2 * batch[0])}, {}),
    )
    ema = None if name == "schedule_free" else 0.9
    tx = make_optimizer(OptimizerConfig(name=name, learning_rate=0.1, ema=ema))
    step = jax.jit(ja.make_step(loss, tx))
    state = ja.init_state({"up": {"kernel": np.eye(4, dtype=np.float32)}}, tx)
    state, good = step(state, np.ones(1, np.float32))
    after, bad = step(state, np.full(1, np.nan, np.float32))
    assert (good["bad_steps"], bad["bad_steps"]) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, after, state)
