"""IFEval: each instruction followed and violated, by hand; strict and loose; whole rows."""

import json

import pytest
from answered import TOK, answered

from jaxalign.rewards import ifeval_accuracy, ifeval_constraints, text_reward
from jaxalign.rewards.ifeval import follow, instructions
from jaxalign.rewards.ifeval_checks import CHECKS, count_sentences


def german(text):
    return "de" if "und" in text else "en"


# Instruction → (arguments, answers that follow it, answers that do not).
TABLE = {
    "keywords:existence": (
        {"keywords": ["river", "Sea"]},
        ["Rivers run to the sea."],
        ["A river.", "sea"],
    ),
    "keywords:frequency": (
        {"keyword": "jolly", "frequency": 2, "relation": "at least"},
        ["Jolly, jolly good"],
        ["jolly"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["can", "C++"]},
        ["The canary sang in C."],
        ["I CAN", "as can.", "in C++!"],
    ),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 3, "let_relation": "less than"},
        ["Zz", "none"],
        ["zZz"],
    ),
    "language:response_language": ({"language": "de"}, ["Wein und Bier"], ["wine and beer"]),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "Dr. Who came. He saw... Then 3.5 p.m. passed. Done."],
        ["Mr. and Mrs. Smith, e.g. those. Two."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a *** b***"],
        ["a\n\nb", "a *** b *** c", "a ***  *** b"],
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "less than"},
        ["three little words"],
        ["these are four words", "don't do it"],  # don and t are two
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["one\n\n'weekend, yes"],
        ["weekend\n\none", "one\n\nweekends", "one\n\nweekend\n\nthree", "one"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] of [address] [x]"],
        ["[name]", "[na\nme] [b]"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        ["Bye.\np.p.s more", "P. P. S too"],
        ["P.S. more"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* one\n* two", "- one\n  * two\ntext"],
        ["* one", "* a\n* b\n- c", "**bold**\n* one"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["Well. My answer is maybe."],
        ["my answer is yes.", "yes"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*one* and **two**"],
        ["*one*", "* a\n* b", "** ** **two**"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1 Section 2"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n3\n```"],
        ["{a: 1}", 'Here: {"a": 1}'],
    ),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<<>>", "<a>", "< <a> >"]),
    "combination:two_responses": (
        {},
        ["one\n******\ntwo"],
        ["one", "one ****** one", "a ****** b ****** c", "a ******  ****** b"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it."},
        ["say it. It."],
        ["It. Say it."],
    ),
    "startend:end_checker": (
        {"end_phrase": "That is all."},
        ['x that IS all."'],
        ["That is all. x"],
    ),
    "startend:quotation": ({}, [' "quoted" '], ['"half', 'a "b"', '"']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and I", "the U.S. COVID-19"],
        ["NASA and Us", "IBMs"],
    ),
    "change_case:english_capital": ({}, ["ALL OF IT, 3 TIMES!"], ["All", "123", "ВСЁ ЭТО"]),
    "change_case:english_lowercase": ({}, ["all of it, 3 times!"], ["all Of", "всё это"]),
    "punctuation:no_comma": ({}, ["none; here."], ["one, here"]),
}


def test_the_table_has_all_25():
    assert set(TABLE) == set(CHECKS)
    assert len(TABLE) == 25


@pytest.mark.parametrize("name", TABLE)
def test_an_instruction_is_followed_or_not(name):
    options, good, bad = TABLE[name]
    row = {"instruction_id_list": [name], "kwargs": [options]}
    assert [follow(text, row, detect=german) for text in good] == [[True]] * len(good)
    assert [follow(text, row, detect=german) for text in bad] == [[False]] * len(bad)
    assert follow(" \n", row, detect=german) == [False]  # an empty answer follows nothing


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two", 2),
        ("Really?! Yes.", 2),
        ('He said "stop." Then he left.', 2),
        ("It costs 3.50 today. Ok.", 2),
        ("J. K. Rowling wrote it. I did.", 2),
        ("It was I. Then not.", 2),
        ("1. First thing.\n2. Second thing.", 2),
        ("He is 5. She is 6.", 2),
        ("a... b", 1),
        ("...", 0),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


ROW = {
    "instruction_id_list": ["en:punctuation:no_comma", "startend:quotation", "keywords:existence"],
    # Tables list every argument for every instruction, null if it has none.
    "kwargs": [{}, {"keywords": None}, {"keywords": ["sea"]}],
}


def test_scores_of_a_row():
    text = '"the sea, the sea"'
    assert ifeval_constraints()("", text, ROW) == pytest.approx(2 / 3)
    assert ifeval_constraints(per="prompt")("", text, ROW) == 0.0
    assert ifeval_constraints(per="prompt")("", '"the sea"', ROW) == 1.0


def test_loose_forgives_a_first_line_a_last_line_and_asterisks():
    strict, loose = ifeval_constraints(per="prompt"), ifeval_constraints(mode="loose", per="prompt")
    for text in ('Sure, here:\n"sea"', '"sea"\nYours, me', 'Oh, so:\n"sea"\nBye, you', '*"sea"*'):
        assert (strict("", text, ROW), loose("", text, ROW)) == (0.0, 1.0)
    assert loose("", 'a\nb\n"sea"', ROW) == 0.0


def test_the_four_figures():
    rows = [ROW, {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]
    figures = ifeval_accuracy(['Sure, here:\n"sea"', "fine"], rows)
    # Strictly the first follows 1 of 3 (the keyword), loosely all; the second its one.
    assert figures == {
        "prompt_strict": 0.5,
        "instruction_strict": 0.5,
        "prompt_loose": 1.0,
        "instruction_loose": 1.0,
    }
    with pytest.raises(ValueError, match="1 completions for 2 rows"):
        ifeval_accuracy(["a"], rows)


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (["fr:punctuation:no_comma"], [{}], "instruction 'fr:punctuation:no_comma': not known"),
        (["keywords:existence"], [{}], r"got the arguments \[\], wanted \['keywords'\]"),
        (["punctuation:no_comma"], [{"a": 1}], r"got the arguments \['a'\], wanted \[\]"),
        (["punctuation:no_comma"], [], "two lists of the same length"),
        ([], [], "at least one instruction"),
        (None, None, "two lists"),
    ],
)
def test_rows_that_cannot_be_checked(ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        instructions({"instruction_id_list": ids, "kwargs": kwargs})


def test_relations_and_options_are_checked():
    options = {"num_words": 4, "relation": "al menos"}
    row = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [options]}
    with pytest.raises(ValueError, match="relation 'al menos': wanted 'less than' or 'at least'"):
        follow("a", row)
    with pytest.raises(ValueError, match="mode='lax': wanted one of strict, loose"):
        ifeval_constraints(mode="lax")
    with pytest.raises(ValueError, match="per='row': wanted one of instruction, prompt"):
        ifeval_constraints(per="row")


def test_language_needs_a_detector(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    from jaxalign.rewards.ifeval import _langdetect

    _langdetect.cache_clear()
    row = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}
    with pytest.raises(ValueError, match=r"langdetect, which is not installed; pip install"):
        follow("Wein", row)


def test_instructions_as_a_text_reward():
    tokens, prompts = answered([("p", '"sea"'), ("q", "no, no")], index=[1, 1])
    reward = text_reward(ifeval_constraints(), TOK, rows=[{}, ROW])
    assert reward(tokens, prompts).tolist() == [1.0, 0.0]


def test_every_english_row_of_ifeval_can_be_checked(shared):
    path = shared / "data/ifeval/en_input_data.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert sum(len(instructions(row, german)) for row in rows) == 834
    assert {i for row in rows for i in row["instruction_id_list"]} == {f"en:{n}" for n in CHECKS}
    # Prompts follow some of their own instructions: they have no commas, or repeat themselves.
    figures = ifeval_accuracy([row["prompt"] for row in rows], rows, german)
    assert 0 < figures["prompt_strict"] < 0.5
