"""The quickstart's judge, PPO's early end, and the live line: by hand and against numpy loops."""

import io
import types

import chatmodel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.commands.quickstart.early_stop import EarlyStop
from jaxalign.commands.quickstart.judge import (
    Features,
    Rate,
    _ridge,
    documents_of,
    lower_layers,
    train_judge,
    win_rate,
)
from jaxalign.commands.quickstart.progress import Progress
from jaxalign.data.files import Row
from jaxalign.run.tasks.task import Task
from jaxalign.types import RolloutBatch, TokenBatch, TrainState

PROMPTS = ["hi", "a longer question", "two"]
ANSWERS = ["yes", "no", "perhaps so"]


def test_lower_layers_share_all_but_the_layers():
    params = tiny.random_params(chatmodel.DECODER, seed=3)
    lower, kept = lower_layers(chatmodel.DECODER, params, depth=0.4)
    assert lower.config.num_layers == 1  # of 2; none would be no model
    assert {leaf.shape[0] for leaf in jax.tree.leaves(kept["blocks"])} == {1}
    rest = {name: value for name, value in params.items() if name != "blocks"}
    assert all(kept[name] is value for name, value in rest.items())
    same = jax.tree.map(lambda a, b: np.array_equal(a[0], b[0]), kept["blocks"], params["blocks"])
    assert all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def features():
    params = tiny.random_params(chatmodel.DECODER, seed=3)
    return Features(chatmodel.DECODER, params, chatmodel.make_tokenizer(), "chatml", depth=0.5)


def test_features_are_those_of_the_lower_layers(features):
    """Against the same model with one layer, an answer at a time, in a loop."""
    documents = features.encode(PROMPTS, ANSWERS)
    found = features(documents)
    assert found.shape == (3, 64)
    model = chatmodel.DECODER
    one = types.SimpleNamespace(**vars(model.config) | {"num_layers": 1})
    assert one.num_layers == model.config.num_layers // 2
    lower = type(model)(type(model.config)(**vars(one)))
    params = tiny.random_params(model, seed=3)
    params["blocks"] = {
        name: {key: {k: v[:1] for k, v in leaf.items()} if isinstance(leaf, dict) else leaf[:1]
               for key, leaf in block.items()}
        for name, block in params["blocks"].items()
    }  # fmt: skip
    for document, row in zip(documents, found, strict=True):
        hidden = np.asarray(lower.apply(params, jnp.asarray(document.ids)[None]))[0]
        answer = np.flatnonzero(document.trained)
        np.testing.assert_allclose(row[:32], hidden[answer[-1]], atol=1e-5)
        # Positions that predict the answer's tokens: one before each.
        np.testing.assert_allclose(row[32:], hidden[answer - 1].mean(axis=0), atol=1e-5)


def test_ridge_by_hand():
    # One feature, differences 1 and 3: (1 + 3) / (1 + 9 + λ) with λ = 2.
    found = _ridge(np.array([[1.0], [3.0]]), penalty=2.0)
    np.testing.assert_allclose(found, [4 / 12])


def pair(prompt, chosen, rejected, kind="cold"):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": kind}
    return Row(row, "here")


def test_a_judge_learns_the_pairs_it_is_given(features):
    rows = [pair(q, "yes " + q, "no", "cold") for q in chatmodel.QUESTIONS]
    # The right way round, and the wrong way.
    held_out = [pair("new", "yes new", "no", "empty"), pair("new", "no", "yes new", "wrong")]
    judge = train_judge(features, rows, held_out, penalty=0.1)
    assert judge.by_kind == {"empty": (1, 1), "wrong": (0, 1)}
    assert (judge.accuracy.share, judge.accuracy.count) == (0.5, 2)
    better, worse = judge.answers(["new", "new"], ["yes new", "no"])
    assert better > worse
    with pytest.raises(ValueError, match="wanted some of each"):
        train_judge(features, rows, [], penalty=0.1)


def test_win_rates_count_ties_as_halves():
    rate = win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 1.0, 5.0]))
    assert (rate.share, rate.count) == (2.5 / 4, 4)
    # Wilson 1927 for 2.5 of 4, z = 1.96.
    z, p, n = 1.959963984540054, 0.625, 4
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    np.testing.assert_allclose(rate[1:3], [(middle - half) / scale, (middle + half) / scale])
    assert Rate.of(0, 0) == (0.0, 0.0, 1.0, 0)


def rollout(rows):
    """Prompts of two tokens on the left of three columns, answers of up to two tokens."""
    inputs = np.array([[0, 5, 6, 7, 0], [4, 5, 6, 7, 8], [1, 1, 1, 0, 0]])
    targets = np.array([[0, 6, 7, 9, 0], [5, 6, 7, 8, 9], [1, 1, 0, 0, 0]])
    segments = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    answer = np.array([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    tokens = TokenBatch(inputs, targets, segments, segments, answer)
    tokens = TokenBatch(*(x[:rows] if x is not None else None for x in tokens))
    zeros = np.zeros(inputs[:rows].shape)
    return RolloutBatch(tokens, *[zeros] * 5)


def test_documents_of_a_rollout():
    one, two = documents_of(rollout(3))  # the last row has no answer
    assert one.ids.tolist() == [5, 6, 7, 9]
    assert one.trained.tolist() == [False, False, True, True]
    assert two.ids.tolist() == [4, 5, 6, 7, 8, 9]
    assert two.trained.tolist() == [False, False, False, True, True, True]


# --- PPO's end -----------------------------------------------------------------------------------


def ended(look, **options):
    """(params that the run ends with or None, iteration) after looking at (score, kl) in turn."""
    limits = {"most_kl": 4.0, "aim_kl": 1.0, "patience": 2, "iterations": 9} | options
    stop = EarlyStop(judge=None, **limits)
    for number, (score, kl, *error) in enumerate(look):
        stop.look({"w": jnp.float32(number)}, score, kl, *error)
        state = stop.end_with(TrainState(0, {"w": jnp.float32(-1)}, {}, ()), number + 1)
        if state is not None:
            return float(state.params["w"]), number, stop.reason
    return None, len(look), stop.reason


def test_a_run_that_gets_better_is_left_alone():
    assert ended([(0.0, 0.0), (0.5, 1.0), (0.4, 2.0), (0.9, 3.9)]) == (None, 4, "")


def test_a_run_that_goes_too_far_ends_with_its_best():
    params, number, reason = ended([(0.0, 0.0), (0.8, 2.0), (0.7, 3.0), (0.2, 4.5)])
    assert (params, number) == (1.0, 3)
    assert reason == "its KL came to 4.5 nats, above 4"


def test_a_better_policy_that_goes_too_far_is_taken_back():
    # √(1 / 16) of the way from the first policy, 0, to the last, 3.
    params, number, reason = ended([(0.0, 0.0), (0.8, 2.0), (0.7, 3.0), (2.0, 16.0)])
    assert (params, number) == (0.75, 3)
    assert reason == "its KL came to 16.0 nats, above 4, and it was taken back to about 1"


def test_the_last_policy_is_taken_back_if_its_kl_will_be_too_large():
    # √KL was 1, then 2: (2 + 3/4)² = 7.5625; √(1 / 7.5625) of the way from 0 to -1.
    params, number, reason = ended([(0.0, 0.0), (0.1, 1.0), (0.2, 4.0)], iterations=3)
    np.testing.assert_allclose(params, -1 / 2.75, rtol=1e-6)
    assert number == 2
    assert reason == (
        "its last policy's KL was about 7.6 nats, above 4, and it was taken back to about 1"
    )
    assert ended([(0.0, 0.0), (0.1, 1.0), (0.2, 2.0)], iterations=3)[0] is None


def test_a_run_that_the_judge_finds_worse_ends_with_its_best():
    params, number, reason = ended([(0.0, 0.0), (0.8, 2.0), (0.7, 3.0), (0.6, 3.5), (9.0, 3.5)])
    assert (params, number) == (1.0, 3)
    assert reason == "the held-out judge's mean score fell from 0.80 to 0.60"


def test_a_score_within_its_error_is_as_good():
    noisy = [(0.0, 0.0, 0.1), (0.8, 2.0, 0.1), (0.75, 2.0, 0.1), (0.71, 2.0, 0.1), (0.7, 2.0, 0.2)]
    assert ended(noisy) == (None, 5, "")


def test_rollouts_are_looked_at_before_their_updates():
    class Length:
        """The score of an answer is its number of tokens."""

        def scores(self, documents):
            return np.array([document.trained.sum() for document in documents], np.float32)

    def prepare_updates(key, state, batch, loop, data):
        return iter([rollout(1), rollout(2)]), {"objective/kl": 1.5}

    stop = EarlyStop(Length(), most_kl=4.0, aim_kl=2.0, patience=1, iterations=9)
    task = Task(None, None, None, 3, {}, prepare_updates, None, None)
    state = TrainState(0, {"w": jnp.float32(7)}, {}, ())
    updates, metrics = stop.adapt(task).prepare_updates(None, state, None, {}, None)
    assert [part.tokens.inputs.shape[0] for part in updates] == [1, 2]
    np.testing.assert_allclose(metrics["judge/score"], (2 + 2 + 3) / 3)
    assert metrics["objective/kl"] == 1.5
    assert stop.judged == [metrics["judge/score"]]


# --- the live line -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_time_left_is_at_the_speed_so_far():
    now = [100.0]
    progress = Progress({"sft": 10.0, "ppo": 30.0}, io.StringIO(), clock=lambda: now[0])
    progress.begin("sft")
    assert progress.seconds_left() == 40.0  # nothing known yet: the other machine's
    bar = progress.make_bar("sft", 4, 0)
    now[0] += 5.0
    bar.update()  # a quarter of 10 s took 5 s: half as fast
    assert progress.seconds_left() == 2.0 * 37.5
    progress.begin("ppo")
    now[0] += 15.0
    assert progress.seconds_left() == 2.0 * 30.0


def test_one_line_a_part_where_there_is_no_terminal():
    file, now = io.StringIO(), [0.0]
    progress = Progress({"sft": 10.0, "ppo": 90.0}, file, clock=lambda: now[0])
    progress.begin("sft")
    bar = progress.make_bar("sft", 2, 0)
    bar.set_postfix_str("loss 2.5")
    bar.update()
    progress.say("done")
    now[0] = 10.0
    progress.begin("ppo")
    bar.close()
    progress.end()
    assert file.getvalue().splitlines() == [
        "[1/2] sft · 0 % · about 1 min 40 s left",
        "done",
        "[2/2] ppo · 0 % · about 1 min 30 s left",
    ]


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    file, now = Terminal(), [0.0]
    progress = Progress({"sft": 10.0}, file, clock=lambda: now[0])
    progress.begin("sft")
    bar = progress.make_bar("sft", 2, 0)
    now[0] = 5.0
    bar.set_postfix_str("loss 2.5")
    bar.update()
    bar.write("kept")
    progress.end()
    shown = file.getvalue()
    assert shown.count("\n") == 1
    assert "\r[1/1] sft · 50 % · loss 2.5 · about 5 s left" in shown
    assert shown.split("\r")[-1] == "kept\n"
