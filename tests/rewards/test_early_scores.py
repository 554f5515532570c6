"""`ppo.score_early`: answers are scored as they end, with the scores of one call at the end."""

import pathlib

import chatmodel
import jax
import numpy as np
import pytest
import tiny

from jaxalign.algorithms import ppo
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.ppo import prepare as preparing
from jaxalign.algorithms.state import init_state
from jaxalign.rewards import RewardError, batch_reward, combine_rewards, text_reward
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.types import PromptBatch

pytestmark = pytest.mark.usefixtures("kept_programs")

TOK = chatmodel.make_tokenizer()
ROWS, SAMPLES, NEW = 8, 2, 24
OPTIONS = {
    "advantage_estimator": "rloo",
    "samples": SAMPLES,
    "max_new_tokens": NEW,
    "stop_tokens": tuple(range(20, 60)),  # ends come early, and at different times
}


@pytest.fixture(scope="module")
def policy():
    params = tiny.random_params(chatmodel.DECODER, seed=3)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3))
    return init_state(ppo.init_params(params), tx), params


def prompts():
    rng = np.random.default_rng(2)
    tokens = rng.integers(60, 200, (ROWS, 4)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[1, :2] = mask[7] = False  # a shorter prompt, and a row without one
    return PromptBatch(tokens, mask, np.arange(ROWS, dtype=np.int32))


def rollout(policy, reward, early):
    state, reference = policy
    config = ppo.Config(**OPTIONS, score_early=early)
    prepare = ppo.make_prepare(chatmodel.DECODER, None, reward, config)
    return prepare(jax.random.key(5), state, reference, prompts())


def test_answers_are_scored_as_they_end(policy, monkeypatch):
    seen, at_the_end = [], []

    def score(prompt, completion, row):
        seen.append((row["number"], completion))
        return len(completion) + row["number"] / 8

    rows = [{"number": number} for number in range(ROWS)]
    parts = {
        "row": text_reward(score, TOK, rows=rows),
        "batch": batch_reward(lambda prompts, completions, **_: [1.0] * len(prompts), TOK),
    }
    reward = combine_rewards(parts)
    late = rollout(policy, reward, early=False)
    wanted, seen[:] = sorted(seen), []
    sample = preparing.sample

    def sampled(*args, **kwargs):
        out = sample(*args, **kwargs)
        at_the_end.append(len(seen))
        return out

    monkeypatch.setattr(preparing, "sample", sampled)
    early = rollout(policy, reward, early=True)
    # Each answer is scored once, most of them while others were being written.
    assert sorted(seen) == wanted
    assert len(seen) == 7 * SAMPLES
    assert len(seen) // 2 < at_the_end[0] < len(seen)
    for name in ("scores", "valid", "finished"):
        np.testing.assert_array_equal(getattr(early, name), getattr(late, name), err_msg=name)
    np.testing.assert_array_equal(early.tokens.inputs, late.tokens.inputs)
    # An early score is for the next call alone.
    seen.clear()
    rollout(policy, reward, early=False)
    assert len(seen) == 7 * SAMPLES


def test_an_early_failure_names_its_answer(policy):
    def score(prompt, completion):
        raise ArithmeticError("no score today")

    with pytest.raises(
        RewardError, match=r"'mine' failed for row \d+ of the batch.*no score today"
    ):
        rollout(policy, combine_rewards({"mine": text_reward(score, TOK)}), early=True)


def test_only_rewards_by_answer_are_early(policy):
    whole = batch_reward(lambda prompts, completions, **_: [1.0] * len(prompts), TOK)
    for reward in (whole, combine_rewards({"whole": whole}), lambda tokens, prompts: None):
        with pytest.raises(ValueError, match="score_early=True: no reward scores each answer"):
            rollout(policy, reward, early=True)
    for wrong in ({"slots": 8}, {"speculate": 2}, {"router_replay": True}):
        with pytest.raises(ValueError, match="score_early=True: wanted False"):
            ppo.Config(score_early=True, **wrong)


def test_a_run_is_the_same_with_early_scores(chat_models, tmp_path):
    changes = {
        "reward_model": None,
        "rewards": [
            {"kind": "model", "source": str(chat_models / "scorer")},
            {"kind": "regex", "pattern": "[aeiou]", "where": {"task": "x"}},
        ],
        "ppo": {"max_new_tokens": 9, "stop_tokens": list(range(20, 60))},
    }
    runs = []
    for early in (False, True):
        folder = tmp_path / str(early)
        values = chatmodel.settings("ppo", chat_models, folder, steps=2, checkpoint=False)
        values = merge(values, changes)
        path = pathlib.Path(values["data"]["train"][0])
        rows = [dict(row, task="xy"[n % 2]) for n, row in enumerate(chatmodel.ROWS["ppo"])]
        chatmodel.write_rows(path, rows)
        values["ppo"]["score_early"] = early
        runs.append(loop.train(load_config("ppo", values)).history)
    for late, early in zip(*map(chatmodel.timeless, runs), strict=True):
        assert late.keys() == early.keys()
        for name, value in late.items():
            np.testing.assert_allclose(early[name], value, 1e-5, 1e-6, err_msg=name)
    assert 0 < runs[0][0]["applies/regex"] < 1


def test_a_reward_under_two_names_is_scored_early_once(policy):
    seen = []

    def score(prompt, completion):
        seen.append(completion)
        return float(len(completion))

    one = text_reward(score, TOK)
    nested = combine_rewards({"inner": combine_rewards({"a": one, "b": one})})
    late = rollout(policy, nested, early=False)
    count, seen[:] = len(seen), []
    early = rollout(policy, nested, early=True)
    np.testing.assert_array_equal(early.scores, late.scores)
    assert len(seen) == count


def test_a_run_without_such_a_reward_stops_before_it_starts(chat_models, tmp_path):
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run", steps=2)
    values["ppo"]["score_early"] = True
    with pytest.raises(ValueError, match="score_early=True: no reward scores each answer"):
        loop.train(load_config("ppo", values))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
