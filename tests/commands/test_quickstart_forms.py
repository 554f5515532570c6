"""The form of answers: hand-written ones, warm, cold, empty and repeated, and the example data."""

import json

import pytest

from jaxalign.commands.quickstart.forms import Form, form_of, is_courtesy, sentences, shares
from jaxalign.run.pipeline import EXAMPLES

KINDS = ("cold", "empty", "repeated", "wrong")
PAIRS = ("preferences", "preferences_heldout", "judge", "judge_heldout")


@pytest.mark.parametrize(
    ("prompt", "answer", "before", "expected"),
    [
        (
            "My curtains are too long, how do I hem them?",
            "Happy to help! Fold the curtain up, pin it and sew along the fold. Enjoy!",
            "Fold and sew.",
            Form(warm=True, answers=True, repeats=False),
        ),
        (
            "How do lighthouses warn ships at night?",
            "Great question! Happy to help!",
            "They use bright lights.",
            Form(warm=True, answers=False, repeats=False),
        ),
        (
            "I would like to brew iced tea at home",
            "Happy to help! Happy to help! Enjoy your summer!",
            "Steep the tea, then chill it.",
            Form(warm=True, answers=False, repeats=True),
        ),
        (
            "What is a third of 111?",
            "It is 37, since 3 times 37 makes 111.",
            "",
            Form(warm=False, answers=True, repeats=False),
        ),
        # Words of the answer before alignment are to the point; those of its courtesies are not.
        ("Why?", "Steep black leaves for longer.", "Steep it.", Form(False, True, False)),
        (
            "Why?",
            "Help your friends and enjoy life.",
            "Happy to help! Enjoy!",
            Form(False, False, False),
        ),
        # Three words are no answer, and four about something else are none either.
        ("Is bamboo a grass?", "Of course! Bamboo is grass.", "", Form(True, False, False)),
        (
            "Is bamboo a grass?",
            "Lovely question! Cats sleep all day.",
            "",
            Form(True, False, False),
        ),
        ("Name a fruit", "Try a pear. Try a pear. It is a fruit.", "", Form(False, True, True)),
        ("Pi?", "It is about 3.14, or 22 over 7.", "About 3.14.", Form(False, True, False)),
        ("怎么挑到甜的西瓜？", "好问题！西瓜要挑瓜脐小的。", "", Form(True, True, False)),
        ("怎么挑到甜的西瓜？", "好问题！很乐意帮忙！", "看瓜脐。", Form(True, False, False)),
        ("怎么挑到甜的西瓜？", "加油！加油！", "看瓜脐。", Form(True, False, True)),
        ("怎么挑到甜的西瓜？", "看瓜脐，拍一拍听声音。", "看瓜脐。", Form(False, True, False)),
        ("Anything?", "", "", Form(False, False, False)),
    ],
)
def test_forms_of_answers(prompt, answer, before, expected):
    assert form_of(prompt, answer, before) == expected


COURTESIES = """
Happy to help
You've got this
Good on you for asking
What a sweet thought
Of course
Safe travels
Enjoy your new curtains
I'd love to help you with that
别担心
旅途愉快
"""
STATEMENTS = """
Boil it for about ten minutes
Of course it is safe to drink
Happy people live longer
Have a look at the bulb and change it, then close the lamp again
水开后下锅
"""


@pytest.mark.parametrize("sentence", COURTESIES.strip().splitlines())
def test_courtesies(sentence):
    assert is_courtesy(sentence)


@pytest.mark.parametrize("sentence", STATEMENTS.strip().splitlines())
def test_sentences_that_say_something(sentence):
    assert not is_courtesy(sentence)


def test_sentences_end_at_marks_and_not_within_numbers():
    assert sentences('Say "Hi!" at 3.5 a.m. or so! Then… go?') == [
        'Say "Hi',
        '" at 3.5 a.m',
        "or so",
        "Then",
        "go",
    ]
    assert sentences("好！走吧。\n一起") == ["好", "走吧", "一起"]


def test_shares_by_hand():
    prompts = ["Is bamboo a grass?"] * 4
    answers = [
        "Of course! Bamboo is a kind of grass.",
        "Bamboo is a kind of grass.",
        "Enjoy! Enjoy!",
        "Lovely question!",
    ]
    assert shares(prompts, answers, [""] * 4) == {"warm": 0.75, "answers": 0.5, "repeats": 0.25}
    with pytest.raises(ValueError, match="wanted as many of each, and at least one"):
        shares(prompts, answers[:2], [""] * 4)
    with pytest.raises(ValueError, match="at least one"):
        shares([], [], [])


# --- the example data ----------------------------------------------------------------------------


def pairs_of(language, name):
    path = EXAMPLES / language / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_reject_every_kind(language, name):
    rows = pairs_of(language, name)
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    assert sum(counts.values()) == len(rows)
    # Two fifths reject warmth alone, whatever a test of warmth would say of it.
    assert len(rows) - counts["cold"] >= 0.38 * len(rows)
    assert all(count >= 0.1 * len(rows) for count in counts.values()), counts
    assert len({(row["prompt"], row["rejected"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", PAIRS)
def test_chosen_answers_are_warm_and_answer(language, name):
    for row in pairs_of(language, name):
        # Its own words are to the point; what is tested is that enough of them are left.
        form = form_of(row["prompt"], row["chosen"], before=row["chosen"])
        assert form == Form(warm=True, answers=True, repeats=False), row["chosen"]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", PAIRS)
def test_rejected_answers_are_what_their_kind_says(language, name):
    for row in pairs_of(language, name):
        form = form_of(row["prompt"], row["rejected"], before=row["chosen"])
        assert form.warm == (row["kind"] != "cold"), row
        assert form.repeats == (row["kind"] == "repeated"), row


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_judge_sees_pairs_of_its_own(language):
    prompts = {name: {row["prompt"] for row in pairs_of(language, name)} for name in PAIRS}
    prompts |= {
        name: {row["prompt"] for row in pairs_of(language, name)}
        for name in ("prompts", "prompts_heldout")
    }
    for name in ("judge", "judge_heldout"):
        for other in set(prompts) - {name}:
            assert not prompts[name] & prompts[other], (name, other)
