"""The examples in the docstrings are true."""

import doctest

import pytest

from jaxalign import masked
from jaxalign.losses import dpo, graded, ppo, process, ranking, reward, sft

MODULES = [masked, sft, reward, ranking, graded, process, dpo, ppo]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
