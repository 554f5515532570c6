"""One set of options for YAML and Python, with one default each."""

import dataclasses
import json

import laid
import pytest

from jaxalign.data import Options, preference_batches, prompt_batches, sft_batches
from jaxalign.data.options import BatchOptions, settings_of
from jaxalign.run.config.data import DataConfig

ROWS = {"rows": 3, "length": 420}


def test_yaml_and_python_share_every_option_and_default():
    shared = {field.name: field.default for field in dataclasses.fields(BatchOptions)}
    for cls in (Options, DataConfig):
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        assert {name: fields[name] for name in shared} == shared


# Positions that were saved before options moved: computed by the code of that time.
@pytest.mark.parametrize(
    ("make", "checksum", "options"),
    [
        ("talks", 3157220850, {}),
        ("talks", 1615003263, {"packing": False, "buckets": [64, 128]}),
        ("talks", 2895331060, {"packing": False, "scripts": ["latin"], "min_tokens": 2}),
        ("talks", 351942676, {"streaming": True, "window": 5}),
        ("pairs", 1458036986, {}),
        ("pairs", 2260663822, {"packing": True, "shared_prefix": True}),
        ("prompts", 2353894323, {}),
    ],
)
def test_equal_options_keep_saved_positions_valid(tiny, make, checksum, options):
    functions = {
        "talks": lambda **o: sft_batches(laid.talks(), tiny, **o),
        "pairs": lambda **o: preference_batches(laid.pairs(), tiny, **o),
        "prompts": lambda **o: prompt_batches(laid.pairs(), tiny, **o),
    }
    assert functions[make](**ROWS, **options).checksum == checksum


def test_the_same_options_as_fields_or_as_an_object(tiny):
    rows = laid.talks()
    given = Options(**ROWS, packing=False, scripts=())
    a, b = sft_batches(rows, tiny, options=given), sft_batches(rows, tiny, **ROWS, packing=False)
    assert a.checksum == b.checksum
    # Fields stand above the object's own.
    c = sft_batches(rows, tiny, options=given, packing=True)
    assert c.checksum == sft_batches(rows, tiny, **ROWS).checksum


def test_what_packing_is_where_it_is_not_given(tiny):
    def packed(batches):
        sides = [getattr(batch, "chosen", batch) for batch in batches]
        return any(side.segment_ids.max() > 1 for side in sides)

    assert packed(sft_batches(laid.talks(), tiny, **ROWS))
    assert not packed(sft_batches(laid.talks(), tiny, **ROWS, buckets=[64]))
    assert not packed(preference_batches(laid.pairs(), tiny, **ROWS))
    with pytest.raises(ValueError, match="packing: got 'best_fit' for prompts"):
        prompt_batches(laid.pairs(), tiny, **ROWS, packing=True)


def test_an_option_that_came_later_enters_the_checksum_only_when_it_is_used():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(Options):
        news: int = 0

    assert settings_of(Later()) == settings_of(Options())
    assert settings_of(Later(news=1)) == [*settings_of(Options()), ["news", 1]]
    assert json.loads(json.dumps(settings_of(Options())))[5] == 1024
