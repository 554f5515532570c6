"""Preference pairs: rankers, ties, both orders of a judge, and runs that are killed."""

import itertools

import pytest
from writers import rows_of

from jaxalign.commands.synth import (
    FunctionWriter,
    Journal,
    PreferenceConfig,
    Preferences,
    RequestFactory,
    Sampling,
    read_prompts,
)
from jaxalign.data import read_rows, to_preference

FACTORY = RequestFactory(7, Sampling(0.7, 1.0, 100))


def prefer(out, answers, judge, judge_calls=None, questions=("q one", "q two"), k=3, **options):
    """Runs over fixed answers: `answers[question]` are the k answers in order."""
    config = PreferenceConfig(prompts=("x",), **({"answers": k, "prompts_per_round": 2} | options))

    def answer(requests):
        found = []
        for request in requests:
            place = int(request.name.rsplit(" ", 1)[1]) - 1
            text = answers[request.messages[-1]["content"]][place]
            found.append((text, "length" if text.endswith("…") else "stop"))
        return found

    def judging(requests):
        if judge_calls is not None:
            judge_calls.extend(requests)
        return [(judge(request), "stop") for request in requests]

    rows = [{"prompt": question} for question in questions]
    examples = read_prompts(PreferenceConfig(prompts=rows))
    journal = Journal(out)
    try:
        run = Preferences(
            config,
            examples,
            FunctionWriter("writer", answer, 4),
            FunctionWriter("judge", judging, 4),
            FACTORY,
            FACTORY,
            journal,
            "en",
        )
        run.run()
    finally:
        journal.close()
    return run, rows_of(out)


def answers_of(row):
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


ANSWERS = {"q one": ["bb", "a", "cccc"], "q two": ["x", "x", "yy"]}


def length_score(request):
    """A reward model that likes long answers."""
    assert request.messages[-1]["role"] == "assistant"
    assert request.sampling.temperature == 0
    return repr(len(request.messages[-1]["content"]) / 2)


def test_best_against_worst_by_a_reward_model(tmp_path):
    out = tmp_path / "out.jsonl"
    run, rows = prefer(out, ANSWERS, length_score, ranker="reward", write_margin=True)
    assert [answers_of(row) for row in rows] == [("cccc", "a"), ("yy", "x")]
    assert [row["margin"] for row in rows] == [1.5, 0.5]
    assert rows[0]["provenance"]["scores"] == {"chosen": 2.0, "rejected": 0.5, "margin": 1.5}
    assert rows[0]["provenance"]["answers"] == [3, 2]
    assert rows[0]["provenance"]["seeds"] == ["row 1"]
    assert run.dropped == {"answer: the same as another": 1}
    pairs = [to_preference(row) for row in read_rows(str(out))]
    assert [pair.margin for pair in pairs] == [1.5, 0.5]


def test_all_pairs_and_ties(tmp_path):
    answers = {"q one": ["bb", "a", "cc"], "q two": ["x", "y", "z"]}
    run, rows = prefer(tmp_path / "all.jsonl", answers, length_score, ranker="reward", pairs="all")
    assert [answers_of(row) for row in rows] == [("bb", "a"), ("cc", "a")]
    assert run.dropped == {"pair: a tie": 4}
    assert "margin" not in rows[0]
    run, rows = prefer(
        tmp_path / "margin.jsonl", answers, length_score, ranker="reward", min_margin=0.6
    )
    assert rows == []
    assert run.dropped == {"pair: difference below min_margin": 1, "pair: a tie": 1}


def test_a_score_that_is_no_number_stops(tmp_path):
    with pytest.raises(ValueError, match="prompt 1/score 1: the reward model's score is nan"):
        prefer(tmp_path / "o.jsonl", ANSWERS, lambda request: "nan", ranker="reward")


def test_grades_and_answers_without(tmp_path):
    grades = {"bb": "Grade: 4", "a": "I would rather not.", "cccc": "Fine.\nGrade: 9", "x": ""}

    def judge(request):
        text = request.messages[-1]["content"]
        return next(g for a, g in grades.items() if f"[answer]\n{a}\n[end]" in text)

    answers = ANSWERS | {"q two": ["x", "cut…", "x"]}
    calls = []
    run, rows = prefer(tmp_path / "o.jsonl", answers, judge, calls, ranker="grade")
    assert [answers_of(row) for row in rows] == [("cccc", "bb")]
    assert rows[0]["provenance"]["scores"] == {"chosen": 9.0, "rejected": 4.0, "margin": 5.0}
    assert run.dropped == {
        "answer: cut off at max_tokens": 1,
        "answer: the same as another": 1,
        "answer: no grade in the judge's reply": 1,
        "prompt: less than two answers to compare": 1,
    }
    assert len(calls) == 3  # a single answer needs no grade
    assert "User: q one" in calls[0].messages[0]["content"]


def pairwise(order):
    """A judge by a function of (first, second)."""

    def judge(request):
        text = request.messages[-1]["content"]
        first = text.partition("[answer A]\n")[2].partition("\n[answer B]")[0]
        second = text.partition("[answer B]\n")[2].partition("\n[end]")[0]
        return f"Because.\nVerdict: {order(first, second)}"

    return judge


def test_both_orders_are_asked_and_must_agree(tmp_path):
    calls = []
    longer = pairwise(lambda a, b: "A" if len(a) > len(b) else "B")
    _, rows = prefer(tmp_path / "o.jsonl", ANSWERS, longer, calls, ranker="pairwise")
    assert [answers_of(row) for row in rows] == [("cccc", "a"), ("yy", "x")]
    assert rows[0]["provenance"]["scores"] == {"chosen": 2.0, "rejected": 0.0, "margin": 2.0}
    assert [request.name for request in calls[:2]] == [
        "prompt 1/answer 1 before 2",
        "prompt 1/answer 2 before 1",
    ]
    assert len(calls) == 3 * 2 + 1 * 2


def test_a_judge_that_favours_a_place_decides_nothing(tmp_path):
    first = pairwise(lambda a, b: "A")
    run, rows = prefer(tmp_path / "o.jsonl", ANSWERS, first, ranker="pairwise")
    assert rows == []
    assert run.dropped["pair: a tie"] == 2
    assert run.notes == {"comparisons in which the order decided, taken as ties": 4}


def test_ties_and_missing_verdicts_of_a_judge(tmp_path):
    verdicts = {("x", "yy"): "B", ("yy", "x"): "tie", ("bb", "a"): "?"}
    judge = pairwise(lambda a, b: verdicts.get((a, b), "tie"))
    run, rows = prefer(tmp_path / "o.jsonl", ANSWERS, judge, ranker="pairwise")
    assert rows == []
    assert run.notes == {
        "comparisons without a verdict, taken as ties": 1,
        "comparisons that are ties in both orders": 2,
        "comparisons in which the order decided, taken as ties": 1,
    }


def test_a_worst_that_beats_the_best_makes_no_pair(tmp_path):
    # w beats x, y; x beats y, z; y beats z; z beats w: wins 2, 2, 1, 1.
    beats = {("w", "x"), ("w", "y"), ("x", "y"), ("x", "z"), ("y", "z"), ("z", "w")}
    judge = pairwise(lambda a, b: "A" if (a, b) in beats else "B")
    answers = {"q one": ["w", "x", "y", "z"]}
    run, rows = prefer(
        tmp_path / "o.jsonl", answers, judge, ranker="pairwise", k=4, questions=("q one",)
    )
    assert rows == []
    assert run.dropped == {"pair: the one with less wins won against the other": 1}


def test_prompts_with_tools_are_refused():
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    row = {"prompt": "q", "tools": [tool]}
    with pytest.raises(ValueError, match="row 1: tools: got some"):
        read_prompts(PreferenceConfig(prompts=[row]))


def test_preferences_killed_and_continued(tmp_path, timeless):
    questions = tuple(f"q {n}" for n in range(6))
    answers = {q: [f"a{n}", "b" * (n + 2), "c"] for n, q in enumerate(questions)}
    prefer(tmp_path / "whole.jsonl", answers, length_score, ranker="reward", questions=questions)
    for stop in (1, 6, 17):
        out, count = tmp_path / f"{stop}.jsonl", itertools.count(1)

        def killed(request, count=count, stop=stop):
            if next(count) > stop:
                raise KeyboardInterrupt
            return length_score(request)

        with pytest.raises(KeyboardInterrupt):
            prefer(out, answers, killed, ranker="reward", questions=questions)
        prefer(out, answers, length_score, ranker="reward", questions=questions)
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
