"""Synthesis: similarity, reading of replies, filters, both methods, and runs that are killed."""

import itertools
import json
import random

import pytest
import writers

import jaxalign.data.synthesis.writer as writer_module
from jaxalign.data import read_rows, to_conversation, to_preference
from jaxalign.data.synthesis import (
    Asker,
    FunctionWriter,
    InstructConfig,
    Journal,
    Pool,
    PreferenceConfig,
    Preferences,
    Sampling,
    SelfInstruct,
    common_subsequence,
    prompts,
    read_prompts,
    read_seed_tasks,
    rouge_l,
    words,
)
from jaxalign.data.synthesis.filters import InstructionFilter, keep_instances
from jaxalign.data.synthesis.prompts import Instance
from jaxalign.pipeline import EXAMPLES

ASKER = Asker(7, Sampling(0.7, 1.0, 100))

# ROUGE-L


@pytest.mark.parametrize(
    ("one", "two", "common", "score"),
    [
        ("a b c d", "a b c d", 4, 1.0),
        ("a b c d", "d c b a", 1, 0.25),  # any one word, of 4 + 4
        ("a b c d", "a x b y", 2, 0.5),
        ("a b a c", "a a", 2, 2 / 3),  # 2·2 / 6
        ("a a", "a", 1, 2 / 3),
        ("a b", "c d", 0, 0.0),
        ("police killed the gunman", "police kill the gunman", 3, 0.75),  # Lin 2004, S1 and S2
        ("police killed the gunman", "the gunman kill police", 2, 0.5),  # S1 and S3
        ("", "a", 0, 0.0),
        ("", "", 0, 0.0),
    ],
)
def test_rouge_l_by_hand(one, two, common, score):
    assert common_subsequence(one.split(), two.split()) == common
    assert rouge_l(one.split(), two.split()) == pytest.approx(score, abs=1e-12)


def test_rouge_l_agrees_with_the_library_and_the_usual_table():
    measure = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="rouge-score is not installed"
    ).RougeScorer(["rougeL"])
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefg", k=draw.randint(1, 40))) for _ in range(10)]
    texts += [task.instruction for task in read_seed_tasks([str(EXAMPLES / "en/seed_tasks.jsonl")])]
    for one, two in itertools.combinations(texts, 2):
        expected = measure.score(one, two)["rougeL"].fmeasure
        assert rouge_l(words(one), words(two)) == pytest.approx(expected, abs=1e-12)


def test_words_of_both_languages():
    assert words("Don't STOP_now: 3.5 kg, naïve!") == [
        "don",
        "t",
        "stop",
        "now",
        "3",
        "5",
        "kg",
        "naïve",
    ]
    assert words("用Python写一首诗。") == ["用", "python", "写", "一", "首", "诗"]
    assert words("これは猫") == list("これは猫")
    assert words("한국어 문장") == ["한국어", "문장"]


def test_the_pool_finds_what_a_full_search_finds():
    draw = random.Random(1)
    pool, texts = Pool(), []
    for _ in range(300):
        text = draw.choices("abcdefghijklmnop", weights=range(16, 0, -1), k=draw.randint(1, 12))
        scores = [rouge_l(text, other) for other in texts]
        best = max(scores, default=0.0)
        assert pool.most_similar(text) == (best, scores.index(best) if best else None)
        pool.add(text)
        texts.append(text)


# Reading replies


def test_lists_are_read_whatever_their_decoration():
    reply = "Here:\n\n9. One thing.\n**10.** Two\n  things.\n11） 三件事\n- 12: Four\n13.\n\nBye"
    assert prompts.read_list(reply) == ["One thing.", "Two things.", "三件事", "Four"]
    assert prompts.read_list("No list at all.\nIn 1999 it began.") == []


def test_instances_are_read_in_both_languages():
    read = prompts.read_instances
    assert read("输入：无\n输出：春天\n来了", False) == [Instance("", "春天\n来了")]
    assert read("**Input**: a\nb\n**Output:**\nc\nInput: d", False) == [
        Instance("a\nb", "c\nInput: d")
    ]
    assert read("Output: only", False) == [Instance("", "only")]
    assert read("Input: none", False) == []
    assert read("Just text", False) == []
    assert read("标签：好\n输入：不错\n标签：坏\n输入：无", True) == [
        Instance("不错", "好"),
        Instance("", "坏"),
    ]
    assert read("Label: lonely", True) == []


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good.\nGrade: 8", 8),
        ("Grade: 3\nNo, better:\n**Grade:** 9/10", 9),
        ("很好。\n分数：10", 10),
        ("Grade: 0", None),
        ("Grade: 11", None),
        ("Grade: 7.5", None),
        ("I grade it 8", None),
        ("", None),
    ],
)
def test_grades(text, grade):
    assert prompts.read_grade(text) == grade


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: A", "A"),
        ("A is nice.\nVerdict: [[B]]", "B"),
        ("Verdict: tie", "tie"),
        ("结论：B", "B"),
        ("结论：平", "tie"),
        ("Verdict: answer A", "A"),
        ("Verdict: Always", None),
        ("A", None),
    ],
)
def test_verdicts(text, verdict):
    assert prompts.read_verdict(text) == verdict


# Filters


def test_instructions_are_dropped_with_the_reason():
    config = InstructConfig(
        seeds=("x",), min_words=4, max_words=9, keywords=("draw", "go to", "画")
    )
    check = InstructionFilter(config, ["Write a short poem about the autumn sea."])
    assert check.why_not("Write it down") == ("instruction of less than 4 words", 0.0)
    long = "one two three four five six seven eight nine ten"
    assert check.why_not(long)[0] == "instruction of more than 9 words"
    assert check.why_not("Please Draw me a sheep")[0] == "keyword 'draw'"
    assert check.why_not("Then go to the shop")[0] == "keyword 'go to'"
    assert check.why_not("请画一只小猫")[0] == "keyword '画'"
    assert check.why_not("Name a drawer in to go sets") == (None, pytest.approx(2 / 15))
    assert check.why_not(": what is this thing")[0] == "instruction begins with a punctuation mark"
    # 7 of 8 + 8 words in common: 14/16.
    reason, score = check.why_not("Write a long poem about the autumn sea.")
    assert reason == "ROUGE-L of 0.7 or more with another"
    assert score == 14 / 16
    # What was kept is compared with, too.
    assert check.why_not("name a drawer in to go sets")[1] == 1.0


def test_the_threshold_itself_is_too_alike():
    config = InstructConfig(seeds=("x",), rouge_threshold=0.75)
    assert InstructionFilter(config, ["a b c d"]).why_not("a b c x") == (
        "ROUGE-L of 0.75 or more with another",
        0.75,
    )
    kept = InstructionFilter(config, ["a b c d e"]).why_not("a b c x y")
    assert kept == (None, 0.6)


def test_instances_are_dropped_with_the_reason():
    config = InstructConfig(seeds=("x",), max_output_words=3)
    given = [
        Instance("a", "fine"),
        Instance("a", "fine"),
        Instance("b", " "),
        Instance("c", "one two three four"),
        Instance("d", "d"),
        Instance("", "Do it"),
        Instance("e", "yes"),
        Instance("e", "no"),
    ]
    kept, reasons = keep_instances(given, "Do it", config)
    assert kept == [Instance("a", "fine")]
    assert reasons == [
        "instance is there twice",
        "output is empty",
        "output of more than 3 words",
        "output repeats the input",
        "output repeats the input",
        "one input with several outputs",
        "one input with several outputs",
    ]


# Seeds


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_seed_tasks_of_the_package(language):
    tasks = read_seed_tasks([str(EXAMPLES / language / "seed_tasks.jsonl")])
    assert len(tasks) >= 16
    assert len({task.id for task in tasks}) == len(tasks)
    assert {task.classification for task in tasks} == {True, False}
    check = InstructionFilter(InstructConfig(seeds=("x",)), [])
    assert [check.why_not(task.instruction)[0] for task in tasks] == [None] * len(tasks)


def test_the_seed_tasks_of_self_instruct(shared):
    tasks = read_seed_tasks([str(shared / "data/stanford-alpaca/seed_tasks.jsonl")])
    assert len(tasks) == 175
    assert sum(task.classification for task in tasks) == 26
    assert tasks[1].id == "seed_task_1"
    assert tasks[1].instances[0].input == "Night : Day :: Right : Left"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": ""}, r"row 1: instruction: got ''"),
        ({"instruction": "a", "instances": []}, r"instances: got \[\]"),
        ({"instruction": "a", "instances": [{"input": "b"}]}, r"instances\[0\].output: got None"),
        ({"instruction": "a", "output": "b", "input": 3}, r"input: got 3"),
        ({"instruction": "a", "output": "b", "is_classification": "no"}, "is_classification"),
    ],
)
def test_wrong_seed_tasks_are_named(row, told):
    with pytest.raises(ValueError, match=told):
        read_seed_tasks([row])


# Self-Instruct


def playing(name="player", rows=3, stop_after=None, calls=None):
    """A writer around `writers.play` that is killed when it has written so much."""
    count = itertools.count(1)

    def answer(requests):
        if calls is not None:
            calls.extend(requests)
        replies = []
        for request in requests:
            if stop_after is not None and next(count) > stop_after:
                raise KeyboardInterrupt
            replies.append((writers.play(request.messages[-1]["content"]), "stop"))
        return replies

    return FunctionWriter(name, answer, rows)


@pytest.fixture
def timeless(monkeypatch):
    """Every reply was written at the same time."""
    monkeypatch.setattr(writer_module, "now", lambda: "2026-01-01T00:00:00+00:00")


def instruct(out, writer, **options):
    config = InstructConfig(
        seeds=("x",), **({"count": 20, "tasks_per_prompt": 4, "prompts_per_round": 2} | options)
    )
    seeds = read_seed_tasks([str(EXAMPLES / "en" / "seed_tasks.jsonl")])
    journal = Journal(out)
    try:
        run = SelfInstruct(config, seeds, writer, ASKER, journal, "en")
        run.run()
    finally:
        journal.close()
    return run, journal


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_self_instruct_writes_rows_that_train(tmp_path):
    out, calls = tmp_path / "out.jsonl", []
    run, journal = instruct(out, playing(calls=calls))
    rows = rows_of(out)
    assert len(rows) == journal.rows == 20
    for row in read_rows(str(out)):
        to_conversation(row)
    seeds = {task.id for task in read_seed_tasks([str(EXAMPLES / "en" / "seed_tasks.jsonl")])}
    first = rows[0]["provenance"]
    assert first["method"] == "self-instruct"
    assert first["writer"] == "player"
    assert first["seed"] == 7
    assert first["sampling"] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 100}
    assert len(first["seeds"]) == 6
    assert set(first["seeds"]) <= seeds
    assert len(first["prompts"]) == 3  # tasks, classification, instances
    assert 0 <= first["scores"]["rouge_l"] < 0.7
    # From the second round on, two machine tasks are shown among eight.
    shown = [row["provenance"]["seeds"] for row in rows]
    later = [ids for ids in shown if len(ids) == 8]
    assert later
    assert all(sum(i.startswith("round ") for i in ids) == 2 for ids in later)
    # Every prompt for tasks brings a picture and something too short.
    asked = sum(request.name.endswith("/tasks") for request in calls)
    assert run.dropped["keyword 'picture'"] + run.dropped["keyword 'draw'"] == asked
    assert run.dropped["instruction of less than 4 words"] == asked
    # Nothing is lost: each of the 6 tasks of a prompt was dropped or went on to be written.
    written = sum(request.name.endswith("/instances") for request in calls)
    before = sum(
        n for why, n in run.dropped.items() if "instr" in why or "keyw" in why or "RO" in why
    )
    assert 6 * asked == before + written


def test_classifications_are_written_labels_first(tmp_path):
    out = tmp_path / "out.jsonl"
    instruct(out, playing(), form="alpaca", count=30)
    rows = rows_of(out)
    classed = [row for row in rows if row["provenance"]["classification"]]
    assert classed
    assert {(row["input"], row["output"]) for row in classed} == {
        ("a summer day", "warm"),
        ("a winter night", "cold"),
    }
    assert all(row["input"] == "" for row in rows if not row["provenance"]["classification"])
    instruct(tmp_path / "none.jsonl", playing(), classification_check=False)
    none = rows_of(tmp_path / "none.jsonl")
    assert not any(row["provenance"]["classification"] for row in none)
    assert len(none[0]["provenance"]["prompts"]) == 2


def test_prompt_and_completion_form(tmp_path):
    out = tmp_path / "out.jsonl"
    instruct(out, playing(), form="prompt_completion", count=30)
    with_input = [row for row in rows_of(out) if row["completion"] == "warm"]
    assert with_input[0]["prompt"].endswith("\na summer day")
    assert [to_conversation(row).trained_from for row in read_rows(str(out))] == [1] * 30


def test_the_seed_decides_what_is_shown(tmp_path, timeless):
    texts = []
    for number in range(2):
        instruct(tmp_path / f"{number}.jsonl", playing())
        texts.append((tmp_path / f"{number}.jsonl").read_bytes())
    assert texts[0] == texts[1]
    seeds = read_seed_tasks([str(EXAMPLES / "en" / "seed_tasks.jsonl")])
    calls, config = [], InstructConfig(seeds=("x",), count=1)
    for seed in (7, 8):
        journal = Journal(tmp_path / f"seed{seed}.jsonl")
        asker = Asker(seed, ASKER.sampling)
        SelfInstruct(config, seeds, playing(calls=calls), asker, journal, "en").run()
        journal.close()
    first = [request for request in calls if request.name == "round 1/prompt 1/tasks"]
    assert first[0].messages != first[1].messages
    assert first[0].seed != first[1].seed


@pytest.mark.parametrize("stop_after", [0, 1, 2, 5, 9, 14, 21])
def test_killed_and_continued_is_the_same_as_uninterrupted(tmp_path, timeless, stop_after):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected, _ = instruct(whole, playing())
    with pytest.raises(KeyboardInterrupt):
        instruct(out, playing(stop_after=stop_after))
    # The kill came in the middle of a line of either file.
    for path, half in ((out, b'{"messages": [{"ro'), (tmp_path / "out.jsonl.journal", b'{"req')):
        with path.open("ab") as file:
            file.write(half)
    calls = []
    run, journal = instruct(out, playing(calls=calls))
    assert out.read_bytes() == whole.read_bytes()
    assert run.dropped == expected.dropped
    assert journal.found[2]
    replies = (tmp_path / "out.jsonl.journal").read_text().splitlines()
    assert len(replies) == len({json.loads(line)["request"] for line in replies})
    assert sorted(replies) == sorted((tmp_path / "whole.jsonl.journal").read_text().splitlines())
    assert journal.asked <= len(replies) - stop_after + 3  # a group of 3 may be half kept


def test_a_half_written_row_is_written_again(tmp_path, timeless):
    out = tmp_path / "out.jsonl"
    instruct(out, playing())
    whole = out.read_bytes()
    for cut in (1, 7, len(whole.splitlines(True)[-1]) + 3):
        out.write_bytes(whole[:-cut])
        calls = []
        instruct(out, playing(calls=calls))
        assert out.read_bytes() == whole
        assert calls == []


def test_more_rows_go_on_where_fewer_ended(tmp_path, timeless):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    instruct(out, playing(), count=5)
    assert len(rows_of(out)) == 5
    instruct(out, playing())
    instruct(whole, playing())
    assert out.read_bytes() == whole.read_bytes()
    _, journal = instruct(out, playing(), count=5)
    assert journal.asked == 0
    assert out.read_bytes() == whole.read_bytes()


def test_other_settings_are_not_mixed_into_a_file(tmp_path):
    out = tmp_path / "out.jsonl"
    instruct(out, playing())
    with pytest.raises(ValueError, match="'round 1/prompt 1/tasks' was asked with another prompt"):
        instruct(out, playing(), tasks_per_prompt=5)
    with pytest.raises(ValueError, match="was asked with another prompt, writer or sampling"):
        instruct(out, playing(name="other"))
    with pytest.raises(ValueError, match=r"out\.jsonl:1: the row differs"):
        instruct(out, playing(), form="alpaca")


def test_a_file_of_others_is_left_alone(tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text('{"prompt": "precious')
    with pytest.raises(ValueError, match=r"no mine\.jsonl\.journal beside it"):
        Journal(out)
    assert out.read_text() == '{"prompt": "precious'


def test_two_runs_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl", reason="no file locks here")
    journal = Journal(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="another process is writing to it"):
        Journal(tmp_path / "out.jsonl")
    journal.close()
    Journal(tmp_path / "out.jsonl").close()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    out = tmp_path / "out.jsonl"
    instruct(out, playing())
    lines = out.read_bytes().splitlines(True)
    out.write_bytes(b"".join([*lines[:2], b"{broken\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"out\.jsonl:3: wanted a JSON object"):
        instruct(out, playing())


def test_a_writer_that_brings_nothing_is_stopped(tmp_path):
    useless = FunctionWriter("useless", lambda requests: [("I cannot.", "stop")] * len(requests), 4)
    with pytest.raises(ValueError, match="3 rounds in a row without a new row") as caught:
        instruct(tmp_path / "out.jsonl", useless, patience=3)
    assert "6 × no list in the reply" in str(caught.value)


def test_replies_cut_off_or_refused_are_counted(tmp_path):
    def answer(requests):
        replies = []
        for request in requests:
            text, finish = writers.play(request.messages[-1]["content"]), "stop"
            if request.name.endswith("prompt 1/tasks"):
                text, finish = text.removesuffix("14. Sing it."), "length"
            if request.name == "round 1/prompt 2/tasks":
                text, finish = "HTTP 400", "refused"
            if request.name.endswith("task 2/instances"):
                finish = "length"
            replies.append((text, finish))
        return replies

    run, _ = instruct(tmp_path / "out.jsonl", FunctionWriter("w", answer, 4))
    assert run.dropped["request refused by the server"] == 1
    assert run.dropped["instruction cut off at max_tokens"] >= 1
    assert run.dropped["cut off at max_tokens"] >= 1


# Preferences


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
            ASKER,
            ASKER,
            journal,
            "en",
        )
        run.run()
    finally:
        journal.close()
    return run, rows_of(out)


def said(row):
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
    assert [said(row) for row in rows] == [("cccc", "a"), ("yy", "x")]
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
    assert [said(row) for row in rows] == [("bb", "a"), ("cc", "a")]
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
    assert [said(row) for row in rows] == [("cccc", "bb")]
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
    assert [said(row) for row in rows] == [("cccc", "a"), ("yy", "x")]
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
