"""A reward kind from outside the package: one registration, then YAML, building and a PPO run."""

import dataclasses

import chatmodel
import numpy as np
import pytest
from answered import TOK, answered

from jaxalign.rewards import RewardSpec, build_reward, register_reward, text_reward
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import write_yaml


@pytest.fixture
def kinds(monkeypatch):
    """The table of kinds, restored afterwards."""
    table = RewardSpec.kinds()
    before = dict(table)
    yield table
    table.clear()
    table.update(before)


@pytest.fixture
def toy(kinds):
    @register_reward
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Vowels(RewardSpec):
        """Share of vowels, times a factor."""

        kind: str = "vowels"
        factor: float = 1.0
        letters: tuple[str, ...] = ("a", "e", "i", "o", "u")

        def __post_init__(self):
            super().__post_init__()
            if self.factor <= 0:
                raise ValueError(f"vowels factor={self.factor}: wanted a positive number")

        def build(self, context):
            def share(prompt, completion):
                count = sum(letter in self.letters for letter in completion.lower())
                return self.factor * count / max(1, len(completion))

            return text_reward(share, context.tok, rows=context.rows, name=context.name)

    return Vowels


SPEC = {"kind": "vowels", "factor": 2, "name": "tone", "weight": 0.5, "letters": ["a", "e", "u"]}
LEAST = {
    "model": {"source": "m"},
    "data": {"train": ["rows.jsonl"]},
    "run": {"folder": "runs/x"},
}


def complaint(spec):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (callers look at the message)
        load_config("ppo", LEAST | {"rewards": [spec]})
    return str(caught.value)


def test_yaml_is_parsed_checked_and_written(toy, tmp_path):
    config = load_config("ppo", LEAST | {"rewards": [SPEC]})
    assert config.rewards == (toy(factor=2.0, name="tone", weight=0.5, letters=("a", "e", "u")),)
    write_yaml(tmp_path / "config.yaml", config)
    assert load_config("ppo", tmp_path / "config.yaml") == config
    assert "vowels factor=0.0: wanted a positive number" in complaint(SPEC | {"factor": 0})
    assert "did you mean rewards[0].factor?" in complaint({"kind": "vowels", "faktor": 2})
    assert "rewards[0].factor: wanted float" in complaint(SPEC | {"factor": "two"})
    assert "weight=nan" in complaint(SPEC | {"weight": float("nan")})


def test_it_is_built_like_a_built_in_kind(toy):
    batch = answered([("p", "aeib"), ("q", "xyz"), ("", "")])
    rows = [{"task": "sing"}, {"task": "talk"}]
    scores = build_reward([toy(factor=4.0, weight=0.5)], TOK, rows=rows)(*batch)
    # factor · vowels / letters: 4 · 3/4 and 0; half of it by the weight.
    np.testing.assert_array_equal(scores.values, [1.5, 0, 0])
    assert list(scores.parts) == ["vowels"]
    specs = [toy(where={"task": "sing"}), toy(name="all")]
    parts = build_reward(specs, TOK, rows=rows)(*batch).parts
    np.testing.assert_array_equal(parts["vowels"].applies, [True, False, False])
    np.testing.assert_array_equal(parts["all"].applies, [True, True, False])


def test_ppo_trains_on_it(toy, chat_models, tmp_path):
    values = chatmodel.settings("ppo", chat_models, tmp_path)
    del values["reward_model"]
    values |= {"rewards": [SPEC], "critic": str(chat_models / "scorer")}
    config = load_config("ppo", values, ["run.steps=1"])
    loop.train(config)
    row = chatmodel.lines(tmp_path)[0]
    assert 0 <= row["rewards/tone"] <= 2
    assert row["objective/scores"] == pytest.approx(0.5 * row["rewards/tone"], abs=1e-6)


def test_a_registration_that_cannot_work_is_refused(kinds):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Taken(RewardSpec):
        kind: str = "regex"

    with pytest.raises(ValueError, match=r"Taken kind='regex': jaxalign\.rewards\.regex\.Regex"):
        register_reward(Taken)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Nameless(RewardSpec):
        limit: int = 3

    with pytest.raises(ValueError, match=r"Nameless kind=None: wanted a name as its default"):
        register_reward(Nameless)

    class Undecorated(RewardSpec):
        kind = "undecorated"

    with pytest.raises(ValueError, match=r"Undecorated: wanted a dataclass derived from RewardSp"):
        register_reward(Undecorated)
    assert not {"undecorated", "limit"} & set(kinds)
