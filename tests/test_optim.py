"""Schedules and the optimizer chain against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.algorithms import low_precision_adam
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, decays, make_optimizer, make_schedule
from jaxalign.algorithms.state import init_state, opt_state_shardings
from jaxalign.parallel.mesh import make_mesh


def rates(count, **options):
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-3, **options))
    return np.array([float(schedule(i)) for i in range(count)])


def test_linear_equals_hugging_faces():
    # lr = peak · min(step/warmup, (total − step)/(total − warmup)), as logged by TRL.
    got = rates(6, schedule="linear", warmup_steps=2, total_steps=5)
    np.testing.assert_allclose(got, [0, 5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3, 0], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(
        rates(4, schedule="linear", total_steps=4, end_fraction=0.2), [1e-3, 8e-4, 6e-4, 4e-4], 1e-6
    )


def test_cosine_and_constant():
    got = rates(6, schedule="cosine", warmup_steps=1, total_steps=5, end_fraction=0.1)
    decay = [0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(5)]
    np.testing.assert_allclose(got, 1e-3 * np.array([0, *decay]), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(rates(3, schedule="constant"), [1e-3] * 3)
    np.testing.assert_allclose(rates(4, schedule="constant", warmup_steps=2), [0, 5e-4, 1e-3, 1e-3])


def test_warm_up_stay_and_decay():
    # 2 updates of rise, 5 at the peak, and over the last 3 (0.25 of 10, rounded up) down to a half.
    got = rates(
        12, schedule="wsd", warmup_ratio=0.2, total_steps=10, decay_ratio=0.25, end_fraction=0.5
    )
    want = [0, 0.5, 1, 1, 1, 1, 1, 1, 1 - 0.5 / 3, 1 - 1 / 3, 0.5, 0.5]
    np.testing.assert_allclose(got, 1e-3 * np.array(want), rtol=1e-5, atol=1e-12)
    # No longer than warm-up leaves.
    got = rates(5, schedule="wsd", warmup_steps=2, total_steps=4, decay_ratio=0.9)
    np.testing.assert_allclose(got, [0, 5e-4, 1e-3, 5e-4, 0], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_every_schedule_has_its_warm_up_by_ratio(schedule):
    got = rates(5, schedule=schedule, warmup_ratio=0.31, total_steps=10)  # 3.1 of 10: 4 updates
    np.testing.assert_allclose(got, [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3], rtol=1e-6, atol=1e-12)


def moves(**options):
    """How far Adam's first update moves weights of 2, with gradients of 1."""
    tree = {"embed": {"embedding": 2}, "up": {"kernel": 2, "bias": 2}, "norm": {"scale": 2}}
    params = jax.tree.map(lambda x: np.full(2, x, np.float32), tree)
    tx = make_optimizer(OptimizerConfig(learning_rate=0.01, max_grad_norm=None, **options))
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    return {k.replace("/", "."): float(x[0]) for k, x in flat(updates).items()}


def flat(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in paths}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_rates_and_weight_decay_by_pattern(moments):
    # Adam's first direction is 1; with decay the update is −rate · (1 + decay · 2).
    got = moves(
        learning_rates={"^embed/": "0.1x", "bias|scale": 0.5, "kernel": 0},
        weight_decay=0.25,
        weight_decays={"bias": 1.0, "embedding": 0.0},
        moments=moments,
    )
    want = {
        "embed.embedding": -0.001,
        "up.kernel": 0.0,
        "up.bias": -0.5 * 3,
        "norm.scale": -0.5,
    }
    assert got == pytest.approx(want, rel=1e-4)
    got = moves(weight_decay=0.25, weight_decays={"embed": 0.0, "norm": 2.0}, moments=moments)
    want = {"embed.embedding": -0.01, "up.kernel": -0.015, "up.bias": -0.01, "norm.scale": -0.05}
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("option", ["learning_rates", "weight_decays"])
def test_patterns_that_decide_nothing_are_refused(option):
    with pytest.raises(ValueError, match=rf"{option}: 'lora_b' matches no trained.*up/kernel"):
        moves(**{option: {"lora_b": 1.0}})
    with pytest.raises(ValueError, match=rf"{option}: all that '\^up/' matches is decided by"):
        moves(**{option: {"kernel|bias": 1.0, "^up/": 2.0}})
    with pytest.raises(ValueError, match=rf"{option}: '\(' is no regular expression"):
        OptimizerConfig(**{option: {"(": 1.0}})


def test_muon_wants_a_matrix():
    params = {
        "embed": {"embedding": np.ones((3, 2))},
        "blocks": {"norm": {"scale": np.ones((2, 2))}},
    }
    with pytest.raises(ValueError, match=r"name='muon'.*there are: blocks/norm/scale, embed/emb"):
        make_optimizer(OptimizerConfig(name="muon")).init(params)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "adam"}, "one of adamw, adafactor, lion, muon, schedule_free, sgd"),
        ({"name": "lion", "eps": 1e-5}, "eps=1e-05: wanted 1e-08 with name='lion'"),
        ({"name": "muon", "moments": "int8"}, "wanted 'float32' with name='muon'"),
        ({"momentum": 0.9}, "momentum=0.9: wanted 0.95 with name='adamw'"),
        ({"name": "muon", "momentum": 1.0}, r"a value in \[0, 1\)"),
        ({"name": "muon", "muon_rms": 0.0}, "positive or null"),
        ({"name": "schedule_free", "schedule": "linear"}, "wanted 'constant' with"),
        ({"name": "schedule_free", "b1": 0.0}, "wanted above 0 with"),
        ({"name": "schedule_free", "ema": 0.9}, "wanted null with"),
        ({"decay_ratio": 0.2}, "decay_ratio=0.2: wanted 0.1 without schedule='wsd'"),
        ({"schedule": "wsd", "decay_ratio": 0.0}, r"a value in \(0, 1\]"),
        ({"ema": 1.0}, r"a value in \(0, 1\), or null"),
        ({"ema": 0.9, "ema_for": ("train",)}, "one or more of eval, export"),
        ({"ema_for": ("eval",)}, "without ema"),
        ({"learning_rates": {"a": -1.0}}, "a rate of 0 or more, or a multiple"),
        ({"learning_rates": {"a": "3"}}, "a rate of 0 or more, or a multiple"),
        ({"learning_rates": {"a": "threex"}}, "a rate of 0 or more, or a multiple"),
        ({"learning_rates": {"a": 1.0}, "learning_rate": 0.0}, "above 0 with learning_rates"),
        ({"weight_decays": {"a": -1.0}}, "0 or more for each pattern"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValueError, match=rf"^optimizer .*{told}"):
        OptimizerConfig(**options)


def test_adamw_with_clipping_by_hand():
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, 2)), "scale": rng.normal(size=3), "bias": rng.normal(size=2)
    }  # fmt: skip
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    config = OptimizerConfig(
        learning_rate=1e-2, schedule="constant", b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1,
        max_grad_norm=0.5,
    )  # fmt: skip
    tx = make_optimizer(config)
    opt_state = tx.init(params)
    want = {k: v.astype(np.float64) for k, v in params.items()}
    first, second = ({k: np.zeros(v.shape) for k, v in params.items()} for _ in range(2))
    got = params
    for step in range(1, 5):
        size = 3.0 if step < 3 else 0.05  # clipped, and small enough not to be
        grads = {k: (size * rng.normal(size=v.shape)).astype(np.float32) for k, v in params.items()}
        updates, opt_state = tx.update(grads, opt_state, got)
        got = jax.tree.map(lambda p, u: p + u, got, updates)
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1.0, 0.5 / norm)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            move = first[name] / (1 - 0.8**step)
            move = move / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-6)
            if name == "kernel":
                move = move + 0.1 * want[name]
            want[name] = want[name] - 1e-2 * move
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, 1e-5, 1e-6, err_msg=name)


def test_no_clipping_when_none():
    tx = make_optimizer(OptimizerConfig(learning_rate=1.0, schedule="constant", max_grad_norm=None))
    state = tx.init({"w": np.zeros(1, np.float32)})
    tx.update({"w": np.full(1, 100.0, np.float32)}, state, {"w": np.zeros(1, np.float32)})
    # Adam hides the scale of one gradient but not the change from one to the next.
    plain = make_optimizer(OptimizerConfig(learning_rate=1.0, schedule="constant"))
    moved = []
    for tx_ in (tx, plain):
        state = tx_.init({"w": np.zeros(1, np.float32)})
        for grad in (1.0, 100.0):
            update, state = tx_.update(
                {"w": np.full(1, grad, np.float32)}, state, {"w": np.zeros(1)}
            )
        moved.append(float(update["w"][0]))
    # m = .9·.1 + .1·g, v = .999·.001 + .001·g²; g = 100, or 1 after clipping (then the move is 1).
    m, v = (0.09 + 10) / 0.19, (0.000999 + 10) / 0.001999
    np.testing.assert_allclose(moved, [-m / np.sqrt(v), -1.0], rtol=1e-4)


def test_decay_spares_norms_and_biases():
    tree = {"a": {"kernel": 1, "bias": 2}, "norm": {"scale": 3}, "embed": {"embedding": 4}}
    want = {"a": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert decays(tree) == want | {"embed": {"embedding": True}}


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": -1.0}, {"schedule": "step"}, {"warmup_steps": -1}, {"total_steps": 0},
        {"end_fraction": 2.0}, {"b1": 1.0}, {"b2": -0.1}, {"eps": 0.0}, {"weight_decay": -0.1},
        {"max_grad_norm": 0.0}, {"moments": "float16"},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        OptimizerConfig(**options)


def test_decay_needs_an_end():
    with pytest.raises(ValueError, match="wants total_steps"):
        make_schedule(OptimizerConfig(schedule="linear"))
    with pytest.raises(ValueError, match=r"warmup_steps=3: wanted fewer than the 3 updates"):
        make_schedule(OptimizerConfig(schedule="cosine", warmup_steps=3, total_steps=3))


def test_small_moments_take_the_memory_that_they_say():
    params = {"kernel": np.zeros((3, 64, 32), np.float32), "scale": np.zeros(32, np.float32)}
    count = 3 * 64 * 32 + 32
    bytes_of = {}
    for kind in ("float32", "bfloat16", "int8"):
        state = jax.eval_shape(make_optimizer(OptimizerConfig(moments=kind)).init, params)
        bytes_of[kind] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    assert bytes_of["float32"] == 8 * count
    assert bytes_of["bfloat16"] == 4 * count
    assert bytes_of["int8"] == 2 * count + 2 * 4 * (3 * 64 + 1)  # and a scale a row and moment


def test_codes_of_int8_moments_by_hand():
    # Powers of 2^(1/6) and 2^(1/8) below the largest of a row are exact, whatever is drawn.
    key = jax.random.key(1)
    m = np.array([[8.0, -4.0, 8 * 2**-0.5, 0.0]], np.float32)
    code, scale = jax.jit(low_precision_adam.encode_m)(key, m)
    np.testing.assert_array_equal(code, [[127, -121, 124, 0]])
    np.testing.assert_array_equal(scale, [[8.0]])
    np.testing.assert_allclose(low_precision_adam.decode_m(code, scale), m, 1e-6)
    v = np.array([[1e-6, 1e-6 / 2, 1e-6 * 2**-31.75, 1e-30, 0.0]], np.float32)
    code, scale = jax.jit(low_precision_adam.encode_v)(key, v)
    np.testing.assert_array_equal(code, [[255, 247, 1, 1, 0]])  # 1e-30 is rounded up
    np.testing.assert_allclose(low_precision_adam.decode_v(code, scale)[0, :3], v[0, :3], 1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rounding_is_right_on_average(kind):
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(2, 20))).astype(np.float32) * 10.0 ** -(np.arange(20) ** 0.5)
    keys = jax.random.split(jax.random.key(2), 4000)
    if kind == "bfloat16":

        def there_and_back(key):
            return low_precision_adam.to_bfloat16(key, x).astype(np.float32)
    else:

        def there_and_back(key):
            return low_precision_adam.decode_v(*low_precision_adam.encode_v(key, x))

    values = jax.jit(jax.vmap(there_and_back))(keys)
    # A step is at most 9 % (2^(1/8)): the mean of 4,000 has a deviation below 0.07 %.
    np.testing.assert_allclose(np.mean(values, axis=0), x, rtol=4e-3)
    assert np.unique(np.asarray(values)[:, 0, 3]).size == 2


def test_small_moments_learn_as_well():
    """A regression whose inputs differ in size by a thousand, b2 = 0.999, 400 updates."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(256, 16)) * np.logspace(-1.5, 1.5, 16)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(16, 4)) / 10).astype(np.float32)
    params = {"a": 0.1 * rng.normal(size=(16, 32)), "b": 0.1 * rng.normal(size=(32, 4))}
    params = jax.tree.map(lambda p: p.astype(np.float32), params)

    def loss(p, rows):
        return (
            (jnp.tanh(jnp.asarray(x)[rows] @ p["a"]) @ p["b"] - jnp.asarray(y)[rows]) ** 2
        ).mean()

    def train(kind):
        config = OptimizerConfig(learning_rate=3e-3, schedule="constant", moments=kind)
        tx = make_optimizer(config)

        def step(carry, rows):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p, rows), state, p)
            return (jax.tree.map(lambda a, b: a + b, p, updates), state), None

        batches = np.random.default_rng(4).integers(0, 256, (400, 64))
        (p, _), _ = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), batches))()
        return float(loss(p, np.arange(256)))

    start = float(loss(params, np.arange(256)))
    exact = train("float32")
    assert exact < 0.2 * start
    for kind in ("bfloat16", "int8"):
        assert train(kind) < 1.1 * exact


def test_scales_of_rows_lie_as_the_rows_do():
    mesh = make_mesh(1, 4, 2)
    layout = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    params = {"kernel": jax.ShapeDtypeStruct((2, 8, 6), np.float32, sharding=layout)}
    state = opt_state_shardings(params, make_optimizer(OptimizerConfig(moments="int8")))
    found = {x.spec for x in jax.tree.leaves(state)}
    assert found == {
        PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "fsdp"), PartitionSpec()
    }  # fmt: skip


def test_moments_in_host_memory_change_nothing():
    mesh = make_mesh(1, 8, 1)
    layout = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"kernel": jax.device_put(np.ones((8, 4), np.float32), layout)}

    def train(offload):
        tx = make_optimizer(OptimizerConfig(learning_rate=0.1, offload=offload))

        def run(state, batch):
            grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2 * batch[:, None]))(state.params)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            moved = jax.tree.map(jnp.add, state.params, updates)
            return state._replace(params=moved, opt_state=opt_state), {}

        state = init_state(params, tx)
        step = compile_step(run, state, mesh)
        for _ in range(2):
            state, _ = step(state, np.arange(8, dtype=np.float32))
        assert step.compiles == 1
        return state

    plain, away = train(False), train(True)
    np.testing.assert_array_equal(plain.params["kernel"], away.params["kernel"])
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(away.opt_state) if x.ndim}
    assert kinds == {"pinned_host"}
    assert away.params["kernel"].sharding.memory_kind != "pinned_host"


@pytest.mark.parametrize("kind", low_precision_adam.MOMENTS)
def test_bfloat16_weights_move_by_steps_smaller_than_they_can_tell(kind):
    """Rounded to the nearest they would stay where they are; at random they follow on average."""
    tx = make_optimizer(
        OptimizerConfig(
            learning_rate=1e-5, schedule="constant", weight_decay=0.0, max_grad_norm=None,
            moments=kind,
        )
    )  # fmt: skip
    params = {"kernel": jnp.full((4, 16, 32), 0.02, jnp.bfloat16)}
    start = np.asarray(params["kernel"], np.float64)
    state = init_state(params, tx)
    grads = {"kernel": jnp.ones((4, 16, 32), jnp.bfloat16)}

    @jax.jit
    def step(state, params):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    opt_state, now = state.opt_state, params
    for _ in range(20):
        opt_state, now = step(opt_state, now)
    assert now["kernel"].dtype == jnp.bfloat16
    moved = start - np.asarray(now["kernel"], np.float64)
    assert (start[0, 0, 0] - 1e-5).astype(jnp.bfloat16) == start[0, 0, 0]
    # Adam's step under a constant gradient is the rate; 2,048 weights make the mean.
    assert moved.mean() == pytest.approx(20e-5, rel=0.1)
    assert len(np.unique(moved)) > 2
    if kind == "float32":
        dtypes = {x.dtype for x in jax.tree.leaves(opt_state) if x.ndim}
        assert dtypes == {jnp.dtype(jnp.float32)}


def test_no_step_moves_no_bfloat16_weight():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 64)), jnp.bfloat16)}
    tx = low_precision_adam.round_weights_at_random()
    updates, _ = tx.update({"kernel": jnp.zeros((3, 64))}, tx.init(params), params)
    assert not np.asarray(updates["kernel"], np.float32).any()
