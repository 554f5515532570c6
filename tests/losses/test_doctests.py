"""The examples in the docstrings are true."""

import doctest

import pytest

from jaxalign.losses import (
    divergence,
    dpo,
    forms,
    graded,
    kto,
    masked,
    ppo,
    process,
    ranking,
    reference_free,
    reward,
    router,
    sft,
    tokens,
)

MODULES = [masked, sft, reward, ranking, graded, process, dpo, forms, divergence, tokens]
MODULES += [reference_free, kto, ppo, router]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_preference_form_has_an_example():
    names = [name for name, value in vars(forms).items() if value.__class__.__name__ == "function"]
    assert len(names) > 10
    assert all(
        ">>>" in (vars(forms)[name].__doc__ or "") for name in names if name != "log_sigmoid"
    )
