"""Rows to examples: each form, and an error naming file:line and column for each fault."""

import pytest

from jaxalign.data import Row, to_conversation, to_preference, to_prompt


def _row(**columns):
    return Row(columns, "f.jsonl:7")


def _say(*texts):
    """Alternating user and assistant turns."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def _talk(**columns):
    """Messages, origin and first trained turn; no tools, no turns left out."""
    found = to_conversation(_row(**columns))
    assert found[3:] == ((), (), False, None, None)
    return found[:3]


def test_conversation_forms():
    assert _talk(messages=_say("q", "a")) == (tuple(_say("q", "a")), "f.jsonl:7", 0)
    assert _talk(prompt="q", completion="a") == (tuple(_say("q", "a")), "f.jsonl:7", 1)
    turns = _say("q", "a", "r", "b")
    split = _talk(prompt=turns[:3], completion=turns[3:])
    assert split == (tuple(turns), "f.jsonl:7", 3)
    assert _talk(prompt=turns[:3], completion="b") == split
    assert to_conversation(_row(instruction="q", output="a", input="")).messages == (
        *_say("q", "a"),
    )
    full = _talk(instruction="q", input="x", output="a", system="s", history=[["q0", "a0"]])
    system = {"role": "system", "content": "s"}
    assert full == ((system, *_say("q0", "a0", "q\nx", "a")), "f.jsonl:7", 0)


def test_extra_keys_of_a_message_are_kept():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "x": 1}]
    assert to_conversation(_row(messages=turns)).messages[1]["x"] == 1


def test_preference_forms():
    q, a, b = _say("q")[0], *({"role": "assistant", "content": c} for c in "ab")
    expected = ((q,), (a,), (b,), None, "f.jsonl:7", (), None)
    for row in (
        _row(prompt="q", chosen="a", rejected="b"),
        _row(prompt=[q], chosen=[a], rejected=[b]),
        _row(prompt="q", chosen=[q, a], rejected=[q, b]),
        _row(chosen=[q, a], rejected=[q, b]),
        _row(instruction="q", input="", output="a", chosen="a", rejected="b"),
    ):
        assert to_preference(row) == expected
    assert to_preference(_row(prompt="q", chosen="a", rejected="b", margin=2)).margin == 2.0
    same = to_preference(_row(chosen=[q, a], rejected=[q, a]))
    assert same.prompt == (q,)
    assert same.chosen == same.rejected == (a,)
    long = to_preference(_row(chosen=_say("q", "a", "r", "b"), rejected=_say("q", "a", "s", "c")))
    assert (len(long.prompt), len(long.chosen), len(long.rejected)) == (2, 2, 2)


def test_prompt_forms_keep_the_row():
    row = _row(prompt="q", answer="42")
    assert to_prompt(row) == (
        tuple(_say("q")),
        "f.jsonl:7",
        {"prompt": "q", "answer": "42"},
        (),
        None,
    )
    assert to_prompt(_row(prompt=_say("q", "a", "r"))).messages == tuple(_say("q", "a", "r"))
    assert to_prompt(_row(instruction="q", input="x")).messages == tuple(_say("q\nx"))
    assert to_prompt(_row(messages=_say("q"))).messages == tuple(_say("q"))


_BAD_CONVERSATIONS = [
    ({"text": "a"}, "columns text, wanted messages"),
    ({"prompt": "q"}, "columns prompt, wanted .*completion"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference pair"),
    ({"messages": "hi"}, "messages: got 'hi', wanted a list"),
    ({"messages": []}, "messages: got an empty list"),
    ({"messages": None}, "messages: got null"),
    ({"messages": ["hi"]}, r"messages\[0\]: got 'hi', wanted an object"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\].role: missing"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content: missing"),
    ({"messages": [{"role": "robot", "content": "x"}]}, r"\[0\].role: got 'robot', wanted one of"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, r"\[0\].role: got a list"),
    ({"messages": [*_say("q"), {"role": "assistant", "content": 3}]}, r"\[1\].content: got 3"),
    ({"messages": _say("q", " \n")}, r"messages\[1\].content: got empty text"),
    ({"messages": _say("", "a")}, r"messages\[0\].content: got empty text"),
    ({"messages": _say("q", "\ud83d")}, r"messages\[1\].content: holds half of a surrogate"),
    ({"messages": _say("q")}, "messages: got no assistant turn"),
    ({"messages": _say("q", "a")[1:]}, r"messages\[0\]: got an assistant turn"),
    ({"prompt": "q", "completion": ""}, "completion: got empty text"),
    ({"prompt": "q", "completion": None}, "completion: got null, wanted text"),
    ({"prompt": "q", "completion": _say("r")}, "completion: got a user turn"),
    ({"prompt": 5, "completion": "a"}, "prompt: got 5, wanted text"),
    ({"instruction": "q", "output": " "}, "output: got empty text"),
    ({"instruction": "", "output": "a"}, "instruction: got empty text"),
    ({"instruction": "q", "input": 1, "output": "a"}, "input: got 1, wanted text"),
    ({"instruction": "q", "output": "a", "history": "h"}, "history: got 'h'"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, r"history\[0\]: got a list"),
]


@pytest.mark.parametrize(("columns", "wanted"), _BAD_CONVERSATIONS)
def test_bad_conversations(columns, wanted):
    with pytest.raises(ValueError, match=r"^f\.jsonl:7: .*" + wanted):
        to_conversation(_row(**columns))


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"prompt": "q", "chosen": "a"}, "columns prompt, chosen, wanted .*'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "prompt: missing"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen: got empty text"),
        ({"prompt": "q", "chosen": "a", "rejected": 4}, "rejected: got 4"),
        ({"prompt": "q", "chosen": _say("q"), "rejected": "b"}, "chosen: got nothing after"),
        ({"prompt": "q", "chosen": _say("z", "a"), "rejected": "b"}, "chosen: got a user turn"),
        ({"chosen": _say("q", "a"), "rejected": _say("r", "b")}, "no common prompt"),
        ({"chosen": _say("q", "a", "r"), "rejected": _say("q", "b")}, "chosen: ends with a user"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "margin: got '1'"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")},
            "margin: got nan",
        ),
    ],
)
def test_bad_preferences(columns, wanted):
    with pytest.raises(ValueError, match=r"^f\.jsonl:7: .*" + wanted):
        to_preference(_row(**columns))


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"text": "q"}, "columns text, wanted prompt"),
        ({"prompt": _say("q", "a")}, "the last message is the assistant's"),
        ({"prompt": {"q": 1}}, "prompt: got a dict, wanted text"),
    ],
)
def test_bad_prompts(columns, wanted):
    with pytest.raises(ValueError, match=r"^f\.jsonl:7: .*" + wanted):
        to_prompt(_row(**columns))
