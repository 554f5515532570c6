"""The table of preference losses: options by row, misspelt ones, losses from outside."""

import inspect

import numpy as np
import pytest

from jaxalign.losses import forms, preference
from jaxalign.losses.dpo import check_options, needs_reference, preference_loss
from jaxalign.losses.preference import Option

PAIRS = [np.array(x, np.float32) for x in ([-4.0, -9.0], [-6.0, -7.0], [-5.0, -8.0], [-6.5, -7.5])]


def squared_margin(chosen, rejected, *, beta, square_margin):
    """(β Δ − margin)²."""
    return (beta * (chosen - rejected) - square_margin) ** 2


@pytest.fixture
def table(monkeypatch):
    """A copy of the table, so that what a test adds is gone after it."""
    monkeypatch.setattr(preference, "TABLE", dict(preference.TABLE))
    return preference.TABLE


def test_a_loss_from_outside_the_package(table):
    options = {"square_margin": Option(0.5, lambda x: x >= 0, "a number ≥ 0")}
    preference.register("square", squared_margin, options)
    gaps = (PAIRS[0] - PAIRS[2]) - (PAIRS[1] - PAIRS[3])
    losses, *_ = preference_loss(*PAIRS, loss_type="square", beta=0.3)
    np.testing.assert_allclose(losses, (0.3 * gaps - 0.5) ** 2, rtol=1e-5)
    losses, *_ = preference_loss(*PAIRS, loss_type="square", beta=0.3, square_margin=0.0)
    np.testing.assert_allclose(losses, (0.3 * gaps) ** 2, rtol=1e-5)
    both, *_ = preference_loss(
        *PAIRS, loss_type=("square", "hinge"), loss_weights=(2.0, 1.0), square_margin=1.0
    )
    want = 2 * (0.1 * gaps - 1) ** 2 + np.maximum(0, 1 - 0.1 * gaps)
    np.testing.assert_allclose(both, want, rtol=1e-5)
    assert needs_reference("square")
    with pytest.raises(ValueError, match=r"square_margin=-1.0: wanted a number ≥ 0"):
        check_options(loss_type="square", square_margin=-1.0)
    with pytest.raises(ValueError, match=r"square_margin=2.0 has no effect on loss_type='hinge'"):
        check_options(loss_type="hinge", square_margin=2.0)
    with pytest.raises(ValueError, match="'square' exists already"):
        preference.register("square", squared_margin, options)
    with pytest.raises(ValueError, match=r"takes the options \['square_margin'\].*\['margin'\]"):
        preference.register("other", squared_margin, {"margin": Option(0.5)})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"simpo_gama": 0.3}, "simpo_gama=0.3: no preference loss has this option; did you mean"),
        ({"loss_type": "simpo", "gamma": 0.3}, "gamma=0.3: no preference loss has this option"),
        ({"reward_shift": 0.5}, "reward_shift=0.5 has no effect on loss_type='sigmoid'"),
        ({"reward_shift": np.ones(2)}, "has no effect on loss_type='sigmoid'"),
        ({"chosen_sft_logps": np.ones(2)}, "has no effect on loss_type='sigmoid'"),
        ({"loss_type": "sft", "chosen_sft_logps": 1.0}, "wanted an array of the pairs' shape"),
    ],
)
def test_options_that_no_loss_reads_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        check_options(**options)


def test_smoothing_stays_with_the_losses_that_take_it():
    """Beside `sigmoid`, `sigmoid_norm` is what it is alone."""
    lengths = {"chosen_lengths": np.array([2.0, 3.0]), "rejected_lengths": np.array([4.0, 1.0])}
    both, *_ = preference_loss(
        *PAIRS, loss_type=("sigmoid", "sigmoid_norm"), label_smoothing=0.2, **lengths
    )
    smoothed, *_ = preference_loss(*PAIRS, label_smoothing=0.2)
    plain, *_ = preference_loss(*PAIRS, loss_type="sigmoid_norm", **lengths)
    np.testing.assert_allclose(both, smoothed + plain, rtol=1e-6)


def test_no_form_swallows_options():
    functions = [x for x in vars(forms).values() if inspect.isfunction(x)]
    kinds = [p.kind for x in functions for p in inspect.signature(x).parameters.values()]
    assert len(functions) > 10
    assert inspect.Parameter.VAR_KEYWORD not in kinds
