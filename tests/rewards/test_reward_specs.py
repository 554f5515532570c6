"""`rewards:` of a configuration: valid and invalid entries, and the functions built from them."""

import dataclasses
import pathlib
import sys

import chatmodel
import numpy as np
import pytest
import tiny
from answered import TOK, answered

import jaxalign
from jaxalign.data import Prompt
from jaxalign.models.scorer import Scorer
from jaxalign.rewards import FunctionReward, ModelReward, build_reward
from jaxalign.rewards.cases import prefilled
from jaxalign.rewards.function import import_function
from jaxalign.rewards.gsm8k import Gsm8kReward
from jaxalign.rewards.ifeval import IfevalReward
from jaxalign.rewards.length import LengthReward
from jaxalign.rewards.model_spec import check_same_template, check_same_tokens
from jaxalign.rewards.regex import RegexReward
from jaxalign.rewards.remote import HttpReward
from jaxalign.rewards.specs import RewardSpec
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge, write_yaml

LEAST = {
    "model": {"source": "some/model"},
    "data": {"train": ["rows.jsonl"]},
    "run": {"folder": "runs/x"},
}
ALL = [
    {"kind": "model", "source": "some/scorer", "attributes": {"help": 1}, "scale": 2},
    {"kind": "model", "name": "other", "source": "b", "tokenizer": "own", "length": 64, "batch": 8},
    {"kind": "function", "path": "mine.py:fn", "calls": "batch", "weight": 0.5},
    {"kind": "gsm8k", "extract": "flexible", "format_score": 0.1, "where": {"task": "sum"}},
    {"kind": "ifeval", "mode": "loose", "per": "prompt"},
    {"kind": "regex", "pattern": "(?s)<a>.*</a>", "how": "fullmatch", "column": "answer"},
    {"kind": "length", "longest": 100, "cache": 20, "weight": -1},
    {"kind": "http", "url": "http://localhost:8000/score", "timeout": 5, "max_failures": 2},
]


def load(rewards, *assignments, **changes):
    return load_config("ppo", merge(LEAST, {"rewards": rewards} | changes), assignments)


def complaint(*arguments, **changes):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (callers look at the message)
        load(*arguments, **changes)
    return str(caught.value)


def test_every_kind_is_parsed():
    config = load(ALL)
    kinds = (ModelReward, ModelReward, FunctionReward, Gsm8kReward, IfevalReward, RegexReward)
    assert tuple(map(type, config.rewards)) == (*kinds, LengthReward, HttpReward)
    assert config.rewards[0] == ModelReward(
        source="some/scorer", attributes={"help": 1.0}, scale=2.0
    )
    assert config.rewards[3].where == {"task": "sum"}
    assert config.rewards[6].weight == -1.0
    assert config.reward_specs() == config.rewards


def test_the_built_in_kinds_are_registered():
    kinds = {"model", "function", "gsm8k", "ifeval", "regex", "length", "http"}
    assert set(RewardSpec.kinds()) >= kinds
    message = complaint([{"kind": "judge"}])
    assert all(kind in message for kind in kinds)
    assert "got 'judge'" in message


@pytest.mark.parametrize("kind", sorted(RewardSpec.kinds()))
def test_docs_list_every_option(kind):
    text = (pathlib.Path(__file__).parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{kind}` |"))
    shared = {field.name for field in dataclasses.fields(RewardSpec)}
    options = {field.name for field in dataclasses.fields(RewardSpec.kinds()[kind])}
    assert all(f"`{option}`" in row for option in options - shared)


def test_yaml_round_trip(tmp_path):
    config = load(ALL)
    write_yaml(tmp_path / "config.yaml", config)
    assert load_config("ppo", tmp_path / "config.yaml") == config


def test_the_short_form_is_a_list_of_one():
    config = load_config("ppo", LEAST | {"reward_model": "some/scorer"})
    assert config.reward_specs() == (ModelReward(source="some/scorer"),)
    assert config.critic_start() == ("some/scorer", None)
    weighed = {"reward_model": "a", "reward_weights": {"help": 1.0}, "critic": "c"}
    config = load_config("ppo", LEAST | weighed)
    assert config.reward_specs()[0].attributes == {"help": 1.0}
    assert config.critic_start() == ("c", {"help": 1.0})


def test_the_critic_starts_from_the_first_model_that_reads_the_policys_tokens():
    assert load(ALL[::-1]).critic_start() == ("some/scorer", {"help": 1.0})
    assert load(ALL[1:], critic="c").critic_start() == ("c", None)
    with pytest.raises(ValueError, match=r"critic=null: there is no reward model"):
        load(ALL[1:]).critic_start()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "judge"}, "rewards[0].kind: wanted one of"),
        ({"source": "x"}, "rewards[0].kind: wanted one of"),
        ({"kind": ["regex"]}, "got ['regex']"),
        ({"kind": "gsm8k", "extrakt": "strict"}, "did you mean rewards[0].extract?"),
        ({"kind": "gsm8k", "url": "x"}, "rewards[0].url: unknown key"),
        ({"kind": "gsm8k", "extract": "last"}, "extract='last': wanted one of strict, flexible"),
        ({"kind": "gsm8k", "weight": "high"}, "rewards[0].weight: wanted float"),
        ({"kind": "gsm8k", "weight": float("nan")}, "weight=nan"),
        ({"kind": "gsm8k", "format_score": float("inf")}, "format_score=inf"),
        ({"kind": "gsm8k", "name": " "}, "name=' '"),
        ({"kind": "gsm8k", "where": {}}, "where={}"),
        ({"kind": "gsm8k", "where": {"level": 3}}, "rewards[0].where.level: wanted str, got 3"),
        ({"kind": "model"}, "rewards[0].source: missing"),
        ({"kind": "model", "source": "x", "tokenizer": "mine"}, "wanted policy or own"),
        ({"kind": "model", "source": "x", "length": 64}, "length=64: wanted None without"),
        ({"kind": "model", "source": "x", "scale": 0}, "scale=0"),
        ({"kind": "model", "source": "x", "attributes": {"a": 0}}, "attributes="),
        ({"kind": "model", "source": "x", "tokenizer": "own", "batch": 0}, "batch=0"),
        ({"kind": "model", "source": "x", "tokenizer": "own", "length": 1}, "length=1"),
        ({"kind": "function", "path": "mine"}, "path='mine': wanted module:function"),
        ({"kind": "function", "path": "a:b", "calls": "once"}, "calls='once'"),
        ({"kind": "ifeval", "per": "row"}, "per='row'"),
        ({"kind": "regex", "pattern": "("}, "pattern='('"),
        ({"kind": "length"}, "wanted exactly one"),
        ({"kind": "http", "url": "ftp://x"}, "url: wanted http"),
        ("gsm8k", "rewards[0]"),
    ],
)
def test_invalid_specs_are_refused(spec, message):
    assert message in complaint([spec])


def test_rewards_or_a_reward_model():
    assert "reward_model: missing" in complaint_without_any()
    both = complaint(ALL, reward_model="x")
    assert "reward_model='x': wanted it, or a list of rewards, and not both" in both
    assert "reward_model=None: wanted it, or" in complaint([])
    assert "reward_weights" in complaint(ALL, reward_weights={"a": 1.0})


def complaint_without_any():
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config("ppo", LEAST)
    return str(caught.value)


# Building

FUNCTIONS = """
from fractions import Fraction
def worth(prompt, completion, row):
    return row["worth"]
def lengths(prompts, completions, **columns):
    return [len(text) for text in completions]
constant = 3
"""
ROWS = [{"worth": 2, "task": "sum", "answer": 7}, {"worth": 4, "task": "chat"}]
BATCH = answered([("p", "#### 7"), ("q", "hello"), ("", "")])


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "some_rewards.py"
    path.write_text(FUNCTIONS)
    return path


def test_specs_become_one_reward(functions):
    reward = build_reward(
        [
            FunctionReward(path=f"{functions}:worth", weight=0.5),
            FunctionReward(path=f"{functions}:lengths", calls="batch", name="size", weight=-1),
            Gsm8kReward(where={"task": "sum"}, weight=10),
            LengthReward(longest=5, where={"task": "chat"}),
            RegexReward(pattern="l+", weight=100),
        ],
        TOK,
        rows=ROWS,
    )
    scores = reward(*BATCH)
    # ½ · worth − length + 10 · right (sums only) + overlong (chats only: 5 ≤ 5) + 100 · has an l
    np.testing.assert_array_equal(scores.values, [1 - 6 + 10, 2 - 5 + 0 + 100, 0])
    assert list(scores.parts) == ["function", "size", "gsm8k", "length", "regex"]
    np.testing.assert_array_equal(scores.parts["gsm8k"].applies, [True, False, False])
    np.testing.assert_array_equal(scores.parts["length"].applies, [False, True, False])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([RegexReward(pattern="a"), RegexReward(pattern="b")], "two rewards are called 'regex'"),
        ([], "got none"),
        ([Gsm8kReward()], r"row 1 of the data: reward 'gsm8k': the row's 'answer' is None"),
        ([IfevalReward()], r"row 0 of the data: reward 'ifeval': the row has instruction_id_list"),
        ([Gsm8kReward(where={"task": "song"})], "where={'task': 'song'}: no row has these"),
        ([FunctionReward(path="nowhere_to_be_found:fn")], "no module 'nowhere_to_be_found'"),
        ([FunctionReward(path="nowhere.py:fn")], "path='nowhere.py:fn': no such file"),
    ],
)
def test_build_refuses_before_training(specs, message):
    with pytest.raises(ValueError, match=message):
        build_reward(specs, TOK, rows=ROWS)


def test_where_needs_rows():
    with pytest.raises(ValueError, match=r"where=.*no rows to look at"):
        build_reward([LengthReward(target=5, where={"task": "sum"})], TOK)


def test_functions_are_found_in_files_modules_and_the_current_folder(functions, monkeypatch):
    assert import_function("math:sqrt")(4.0) == 2.0
    monkeypatch.chdir(functions.parent)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert import_function("some_rewards:worth")("", "", {"worth": 5}) == 5
    for name in ("absent", "constant"):
        with pytest.raises(ValueError, match=f"has no function '{name}'"):
            import_function(f"{functions}:{name}")
    functions.write_text("import not_there_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        import_function(f"{functions}:worth")


def test_reward_model_with_another_tokenizer_is_refused(chat_models):
    check_same_tokens(TOK, str(chat_models / "scorer"))
    other = chatmodel.make_tokenizer()
    other.add_tokens(["sun"])  # one more ordinary token that the reward model does not have
    with pytest.raises(ValueError, match=r"another tokenizer than the policy: 'sun' is 260 here"):
        check_same_tokens(other, str(chat_models / "scorer"))


def test_reward_model_is_loaded_by_default(chat_models):
    source = str(chat_models / "scorer")
    scores = build_reward([ModelReward(source=source, shift=1.0)], TOK)(*BATCH)
    params = tiny.random_params(Scorer(chatmodel.DECODER), seed=4)  # as chatmodel saved it
    plain = jaxalign.model_reward(Scorer(chatmodel.DECODER), params)(*BATCH)
    np.testing.assert_allclose(scores.values[:2], np.asarray(plain)[:2] - 1.0, atol=1e-5)
    with pytest.raises(ValueError, match="without a score; wanted a reward model"):
        build_reward([ModelReward(source=str(chat_models / "chat"))], TOK)


ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def test_a_reward_model_under_another_chat_template_is_refused(chat_models, tmp_path):
    source = str(chat_models / "scorer")
    check_same_template(TOK, None, source)
    # The same said in other words is the same.
    check_same_template(TOK, chatmodel.CHATML.replace("message", "m"), source)
    with pytest.raises(ValueError, match="another chat template than the policy") as caught:
        check_same_template(TOK, ALPACA, source)
    for shown in ("'<|im_start|>user\\nSay it<|im_end|>", "'### user:\\nSay it<|im_end|>",
                  "tokenizer: own", "chat_template: policy"):  # fmt: skip
        assert shown in str(caught.value)
    spec = ModelReward(source=source)
    with pytest.raises(ValueError, match="another chat template than the policy"):
        build_reward([spec], TOK, chat_template=ALPACA)
    # By name it reads the policy's form; under a template it reads text.
    as_it_is = dataclasses.replace(spec, chat_template="policy")
    assert not as_it_is.reads_text
    build_reward([as_it_is], TOK, chat_template=ALPACA)
    assert dataclasses.replace(spec, chat_template="chatml").reads_text
    # A reward model whose folder has no template is accepted.
    plain = chatmodel.make_tokenizer(chat_template=None)
    plain.save_pretrained(tmp_path)
    check_same_template(TOK, ALPACA, str(tmp_path))


def test_text_is_passed_where_a_reward_has_a_template_of_its_own(chat_models):
    """Under the policy's own template both ways give the same scores."""
    source = str(chat_models / "scorer")
    turns = ({"role": "user", "content": "hi"},)
    rows = [Prompt(turns, "f:1", {}), Prompt(turns, "f:2", {})]
    whole = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    batch = answered([(whole, "yes<|im_end|>"), (whole, "no<|im_end|>")])
    direct = build_reward([ModelReward(source=source)], TOK, rows=rows)(*batch)
    spec = ModelReward(source=source, chat_template=chatmodel.CHATML)
    passed = build_reward([spec], TOK, rows=rows, chat_template=ALPACA)(*batch)
    np.testing.assert_allclose(passed.values, direct.values, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "wrote"),
    [
        ("hi<|im_end|>\n<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("hi<|im_start|>assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("why <think>?<|im_end|>\n<|im_start|>assistant\n", ""),
        ("hi[THINK]", "[THINK]"),
        ("hi<|START_THINKING|>", "<|START_THINKING|>"),
        ("hi", ""),
    ],
)
def test_what_the_template_wrote_of_an_answer(prompt, wrote):
    assert prefilled(TOK, np.asarray(TOK.encode(prompt))) == wrote


def test_a_format_reward_may_see_what_the_template_wrote():
    batch = answered([("hi<|im_start|><think>\n", "two</think>4"), ("hi<|im_start|>", "4")])
    spec = RegexReward(pattern="(?s)<think>.*</think>.*", how="fullmatch")
    assert build_reward([spec], TOK)(*batch).values.tolist() == [0, 0]
    seeing = dataclasses.replace(spec, with_prefill=True)
    assert build_reward([seeing], TOK)(*batch).values.tolist() == [1, 0]
