"""Verifiable rewards: final numbers, regular expressions, lengths."""

import json
from fractions import Fraction

import numpy as np
import pytest
from answered import TOK, answered

from jaxalign.rewards import gsm8k_answer, length_reward, regex_match, text_reward
from jaxalign.rewards.gsm8k import final_number, parse_number

# Final numbers: (text, strict, flexible)

NUMBERS = [
    ("so 24 + 48 = 72\n#### 72", "72", "72"),
    ("#### 72.", "72", "72"),
    ("####72", "72", "72"),
    ("#### 1,234.50 dollars.", "1234.5", "1234.5"),
    ("#### $1,000,000", "1000000", "1000000"),
    ("#### -$5", "-5", "-5"),
    ("#### $-5", "-5", "-5"),
    ("#### −5", "-5", "-5"),  # a typographic minus
    ("#### 50%", "50", "50"),
    ("#### 42km", "42", "42"),
    ("#### 42.00", "42", "42"),
    ("#### .5", "1/2", "1/2"),
    ("#### 1/4", "1/4", "1/4"),
    ("#### 42\n#### 43", "43", "43"),  # the last one counts
    ("#### 42 because 3 + 4", "42", "42"),
    (r"so \boxed{42}", "42", "42"),
    (r"\boxed{\$1{,}234}", "1234", "1234"),
    (r"\boxed{\frac{1}{2}}", "1/2", "1/2"),
    (r"\boxed{-\dfrac{3}{4}}", "-3/4", "-3/4"),
    (r"\boxed{42\text{ dollars}}", "42", "42"),
    (r"\boxed{50\%}", "50", "50"),
    (r"\boxed{ $18$ }", "18", "18"),
    (r"#### 5, or \boxed{6}", "6", "6"),
    # No final number, strictly; the last number otherwise.
    ("The answer is **$18**.", None, "18"),
    ("The final answer is: 1,080 of 2,000", None, "1080"),
    ("Answer: -3 degrees", None, "-3"),
    ("5 - 3 leaves 2 apples", None, "2"),
    ("it is 3-4=9", None, "9"),
    ("from 7 to -2", None, "-2"),
    ("9.5.", None, "19/2"),
    (r"\boxed{3x+2}", None, "2"),
    (r"\boxed{42", None, "42"),
    ("#### forty-two, that is 42", None, "42"),
    # Ambiguous numbers are rejected.
    ("#### 3,5", None, "5"),
    ("#### 1e5", None, "5"),
    ("#### 1/0", None, "0"),
    ("none at all", None, None),
    ("", None, None),
    ("####", None, None),
    ("#### " + "9" * 5000, None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), NUMBERS, ids=lambda x: str(x)[:24])
def test_the_final_number_of_a_text(text, strict, flexible):
    for extract, expected in (("strict", strict), ("flexible", flexible)):
        found = final_number(text, extract)
        assert found == (None if expected is None else Fraction(expected))


def test_right_answers_score_1():
    row = {"answer": "She has 24 + 48 = <<24+48=72>>72.\n#### 1,072"}
    strict, flexible = gsm8k_answer(format_score=0.1), gsm8k_answer(extract="flexible")
    assert strict("", "#### $1072.00", row) == 1.0
    assert strict("", "#### 1073", row) == 0.1  # a number, but not the right one
    assert strict("", "it is 1072", row) == 0.0  # not in the form
    assert flexible("", "it is 1072", row) == 1.0
    assert flexible("", "it is 1,073", row) == 0.0
    assert gsm8k_answer(column="gold")("", "#### 0.5", {"gold": 0.5}) == 1.0


@pytest.mark.parametrize("given", [None, "", "twelve", "3 or 4", True, [4]])
def test_a_row_without_a_right_answer_is_an_error(given):
    with pytest.raises(ValueError, match=r"the row's 'answer' is .*wanted a number"):
        gsm8k_answer()("", "#### 4", {"answer": given})


def test_options_of_final_numbers():
    with pytest.raises(ValueError, match="extract='last': wanted one of strict, flexible"):
        gsm8k_answer(extract="last")
    assert parse_number(" £3 ") == 3
    assert parse_number("3 4") is None


def test_gsm8k_answers_match_themselves(shared):
    lines = (shared / "data/gsm8k/test.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 1319
    for row in map(json.loads, lines):
        completion = row["answer"].replace("####", "The answer is")
        assert gsm8k_answer()("", row["answer"], row) == 1.0
        assert gsm8k_answer()("", completion, row) == 0.0
        assert gsm8k_answer(extract="flexible")("", completion, row) == 1.0


# Regular expressions


def test_regex_match():
    tag = r"(?s)<think>.*</think>\s*<answer>(.*?)</answer>"
    right = "<think>2\n+ 2</think> <answer> 4 </answer>"
    assert regex_match(tag)("", right) == 1.0
    assert regex_match(tag)("", "4") == 0.0
    assert regex_match(r"\d+", how="fullmatch")("", "123") == 1.0
    assert regex_match(r"\d+", how="fullmatch")("", "123 ") == 0.0
    equal = regex_match(tag, column="answer")
    assert equal("", right, {"answer": 4}) == 1.0
    assert equal("", right, {"answer": "5"}) == 0.0
    assert regex_match(r"[A-D]", column="key")("", "B", {"key": "B"}) == 1.0


def test_wrong_regular_expressions_and_rows():
    with pytest.raises(ValueError, match=r"pattern='\(': missing \)"):
        regex_match("(")
    with pytest.raises(ValueError, match="how='match': wanted one of search, fullmatch"):
        regex_match("a", how="match")
    with pytest.raises(ValueError, match="the row has no column 'answer'"):
        regex_match("a", column="answer")("", "a", {})
    # Without a column no rows are needed.
    tokens, prompts = answered([("p", "yes"), ("q", "no")])
    np.testing.assert_array_equal(text_reward(regex_match("y"), TOK)(tokens, prompts), [1, 0])


# Lengths; one token per byte

WORDS = answered([("p", "x" * n) for n in (0, 1, 10, 15, 18, 20, 21, 40)])


def test_soft_overlong_punishment_equals_dapo():
    # Eq. 13 with L_max = 20 and L_cache = 10, by hand; the first row is empty.
    expected = [0, 0, 0, -0.5, -0.8, -1, -1, -1]
    np.testing.assert_allclose(length_reward(longest=20, cache=10)(*WORDS), expected, rtol=1e-6)
    np.testing.assert_array_equal(length_reward(longest=20)(*WORDS), [0, 0, 0, 0, 0, 0, -1, -1])


def test_distance_from_a_target():
    expected = [-1, -0.9, 0, -0.5, -0.8, -1, -1, -1]
    np.testing.assert_allclose(length_reward(target=10)(*WORDS), expected, rtol=1e-6)
    expected = [-0.5, -0.45, 0, -0.25, -0.4, -0.5, -0.55, -1]
    np.testing.assert_allclose(length_reward(target=10, width=20)(*WORDS), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"longest": 5, "target": 5},
        {"longest": 5, "cache": 6},
        {"longest": 5, "cache": -1},
        {"longest": 5, "width": 3},
        {"target": 0},
        {"target": 5, "width": 0},
        {"target": 5, "cache": 1},
    ],
)
def test_incompatible_length_options_are_refused(options):
    with pytest.raises(ValueError, match="length reward"):
        length_reward(**options)
