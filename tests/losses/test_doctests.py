"""The examples in the docstrings are true."""

import doctest

import pytest

from jaxalign import masked
from jaxalign.losses import dpo, ppo, reward, router, sft


@pytest.mark.parametrize(
    "module", [masked, sft, reward, dpo, ppo, router], ids=lambda m: m.__name__
)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
