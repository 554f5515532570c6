"""Win rates: verdicts in both orders, ties, lengths, and judges that do not decide."""

import json

import chatmodel
import numpy as np
import pytest
import writers
from scipy import optimize

from jaxalign.commands import cli
from jaxalign.commands.eval import judges, win_rate
from jaxalign.commands.eval.judges import language_judge, verdict
from jaxalign.commands.eval.language_model import EvalOptions
from jaxalign.commands.eval.win_rate import Verdicts, length_controlled, measure_win_rate
from jaxalign.commands.synth.writer import FunctionWriter
from jaxalign.rewards.evaluation import wilson


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("[[A]]", "A"),
        ("A is shorter, but\n[[B]]", "B"),
        ("[[A]] at first; on reflection [[ B ]]", "B"),
        ("A cat.\nVerdict: B", "B"),
        ("**A**", "A"),
        ("A or B", None),
        ("neither", None),
        ("A's better\nnone", None),
        ("Alas, Both", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_letter(text, letter):
    assert verdict(text) == letter


def judge_by(decide, **options):
    """A judge from (answer A, answer B) → reply."""

    def reply(requests):
        replies = []
        for request in requests:
            text = request.messages[0]["content"]
            a = text.partition("[answer A]\n")[2].partition("\n\n[answer B]")[0]
            b = text.partition("[answer B]\n")[2].partition("\n\nEnd with")[0]
            assert "user: why?" in text
            replies.append((decide(a, b), "stop"))
        return replies

    return language_judge(FunctionWriter("fake", reply, 3), **options)


PROMPTS = [[{"role": "user", "content": "why?"}]] * 4


def test_both_orders_must_agree():
    judge = judge_by(lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]")
    found = judge(PROMPTS, ["long one", "s", "long", "x"], ["short", "longer", "l", "xy"])
    assert found.wins.tolist() == [1, 0, 1, 0]
    # One that always prefers the first place says nothing.
    biased = judge_by(lambda a, b: "[[A]]")(PROMPTS, ["a"] * 4, ["b"] * 4)
    assert biased.wins.tolist() == [0.5] * 4
    assert biased.notes == ["4 of 4 pairs are ties, since the two orders disagree"]


def test_a_judge_that_does_not_decide_is_counted_and_stops_above_a_bound():
    def decide(a, b):
        return "hm" if a == "x" else "[[A]]" if a == "good" else "[[B]]"

    first, second = ["good", "x", "good", "good"], ["bad"] * 4
    with pytest.raises(ValueError, match=r"'fake' answered neither A nor B in 1 of 8 replies.*hm"):
        judge_by(decide)(PROMPTS, first, second)
    found = judge_by(decide, max_undecided=0.2)(PROMPTS, first, second)
    # The second order of pair 2 prefers x, and the first says nothing: still a lead.
    assert found.wins.tolist() == [1, 1, 1, 1]
    assert found.notes[0] == "1 of 8 replies named neither A nor B"


def test_at_equal_lengths_the_rate_is_the_plain_one():
    wins = [1, 1, 0.5, 0, 1]
    rate, low, high = length_controlled(wins, [3] * 5)
    assert rate == pytest.approx(0.7)
    assert low < 0.7 < high
    assert length_controlled([], []) == (0.5, 0.0, 1.0)


def test_the_regression_is_the_one_that_a_general_optimizer_finds():
    rng = np.random.default_rng(1)
    delta = rng.normal(20, 50, 200)
    x = np.tanh(delta / delta.std())
    wins = (rng.uniform(size=200) < 1 / (1 + np.exp(-(-0.4 + 2 * x)))).astype(float)
    wins[::10] = 0.5

    def cost(parameters):
        z = parameters[0] + parameters[1] * x
        return np.sum(np.logaddexp(0, z) - wins * z) + parameters[1] ** 2 / 2

    best = optimize.minimize(cost, np.zeros(2), tol=1e-10).x
    rate, low, high = length_controlled(wins, delta)
    assert rate == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)
    assert low < rate < high
    # Longer answers win here, and the first ones are longer: controlled, they win less.
    assert rate < wins.mean()


def test_all_won_ends_near_one():
    rate, low, high = length_controlled([1.0] * 30, np.arange(30))
    assert 0.99 < low <= rate <= high <= 1


def test_figures_of_answers(tmp_path):
    class Scripted:
        def __init__(self, *answers):
            self.options, self.given = EvalOptions(), list(answers)

        def answers(self, prompts):
            assert prompts == [[{"role": "user", "content": p["prompt"]}]
                               for p in chatmodel.PROMPTS[:3]]  # fmt: skip
            return self.given

    def judge(prompts, first, second):
        return Verdicts(np.array([1.0, 0.5, 0.0]), ["a note"], [{"n": i} for i in range(3)])

    file = chatmodel.write_rows(tmp_path / "p.jsonl", chatmodel.PROMPTS[:3])
    result = measure_win_rate(Scripted("aaaa", "bb", "cc"), Scripted("d", "e", "ff"), [file], judge)
    assert result.figures["win_rate"][:4] == (0.5, *wilson(1.5, 3), 3)
    assert result.figures["length_ratio"].value == 2.0
    assert result.rows[1] == {
        "origin": f"{file}:2", "answer": "bb", "other": "e", "win": 0.5, "n": 1
    }  # fmt: skip


def test_a_reward_model_judges_and_an_empty_answer_loses(monkeypatch):
    monkeypatch.setattr(judges, "load_scorer", lambda source: (None, None, None))
    monkeypatch.setattr(
        judges,
        "score_conversations",
        lambda s, p, t, conversations, **_: np.array(
            [len(messages[-1]["content"]) for messages in conversations], np.float32
        ),
    )
    judge = judges.reward_judge("scorer", EvalOptions())
    found = judge(PROMPTS, ["aaa", "a", "bb", " "], ["a", "aaa", "cc", "x"])
    assert found.wins.tolist() == [1, 0, 0.5, 0]
    assert found.notes == ["1 empty answers lose, or tie with another"]


def test_the_command_asks_a_server(chat_models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(win_rate, "RESAMPLES", 10)

    def answer(body, number):
        assert body["temperature"] == 0
        return 200, {}, writers.completion("[[A]]")

    file = chatmodel.write_rows(tmp_path / "p.jsonl", chatmodel.PROMPTS[:3])
    model, out = str(chat_models / "chat"), tmp_path / "out.json"
    with writers.serving(answer) as server:
        command = ["eval", model, "--win-rate", file, "--versus", model, "--judge", "some-model"]
        command += ["--judge-url", server.address, "--max-new-tokens", "4", "--out", str(out)]
        assert cli.main(command) == 0
    assert len(server.seen) == 6
    assert {body["model"] for _, _, body in server.seen} == {"some-model"}
    results = json.loads(out.read_text())["results"]["win-rate"]
    # Greedy answers of one model are the same, and the judge goes by the place.
    assert results["figures"]["win_rate"]["value"] == 0.5
    assert all(row["answer"] == row["other"] for row in results["rows"])
    assert "sk-secret" not in capsys.readouterr().out + out.read_text()
