"""Synthesis: similarity, reading of replies, filters and seeds."""

import itertools
import random

import pytest

from jaxalign.commands.synth import (
    InstructConfig,
    Pool,
    common_subsequence,
    prompts,
    read_seed_tasks,
    rouge_l,
    words,
)
from jaxalign.commands.synth.filters import InstructionFilter, keep_instances
from jaxalign.commands.synth.prompts import Instance
from jaxalign.run.pipeline import EXAMPLES

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
    ("row", "message"),
    [
        ({"instruction": ""}, r"row 1: instruction: got ''"),
        ({"instruction": "a", "instances": []}, r"instances: got \[\]"),
        ({"instruction": "a", "instances": [{"input": "b"}]}, r"instances\[0\].output: got None"),
        ({"instruction": "a", "output": "b", "input": 3}, r"input: got 3"),
        ({"instruction": "a", "output": "b", "is_classification": "no"}, "is_classification"),
    ],
)
def test_wrong_seed_tasks_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_seed_tasks([row])
