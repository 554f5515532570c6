"""transformers' name of a cache of keys and values: `past_key_values`, later `cache`."""

import inspect


def name_for(model):
    """The argument's name, which the output has too."""
    there = inspect.signature(model.forward).parameters
    return "cache" if "cache" in there else "past_key_values"


def given(model, cache):
    """The argument; none where there is no cache yet."""
    return {} if cache is None else {name_for(model): cache}


def of(model, output):
    """The cache that a call gave back."""
    return getattr(output, name_for(model))
