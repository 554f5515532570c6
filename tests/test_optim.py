"""Schedules and the optimizer chain against plain numpy."""

import jax
import numpy as np
import pytest

from jaxalign.optim import OptimizerConfig, decays, make_optimizer, make_schedule


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
        {"max_grad_norm": 0.0},
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
    with pytest.raises(ValueError, match=r"total_steps=3 .*warmup_steps=3"):
        make_schedule(OptimizerConfig(schedule="cosine", warmup_steps=3, total_steps=3))
