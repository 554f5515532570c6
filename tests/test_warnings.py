"""Warnings about our own code are errors; those about other packages are only printed."""

import warnings

import pytest


def warn(module, category=DeprecationWarning):
    warnings.warn_explicit("old", category, f"{module}.py", 1, module, registry={})


@pytest.mark.parametrize("module", ["jaxalign", "jaxalign.losses.dpo", "test_warnings", "tiny"])
def test_warnings_about_our_code_are_errors(module):
    with pytest.raises(DeprecationWarning):
        warn(module)
    with pytest.raises(FutureWarning):
        warn(module, FutureWarning)


@pytest.mark.parametrize(
    "module", ["transformers.utils", "jax._src.api", "jaxalign_extra", "torch"]
)
def test_warnings_about_other_packages_are_printed(module):
    with warnings.catch_warnings(record=True) as told:
        warn(module)
    assert [str(warning.message) for warning in told] == ["old"]


LIBRARY = """
import warnings
def old(level):
    warnings.warn("old is going", FutureWarning, stacklevel=level)
"""


def test_what_a_library_says_of_a_call_counts_where_the_call_is():
    library = {"__name__": "library"}
    exec(LIBRARY, library)
    with pytest.raises(FutureWarning):
        library["old"](2)  # about the caller, which is this file
    with warnings.catch_warnings(record=True) as told:
        library["old"](1)  # about itself
    assert len(told) == 1
