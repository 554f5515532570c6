"""Properties of random conversations and random columns, over templates and spellings in use."""

import chatty
import numpy as np
import pytest

from jaxalign.data import (
    Conversation,
    Faults,
    RowError,
    encode_training,
    read_examples,
    to_conversation,
    to_preference,
    to_prompt,
)
from jaxalign.data.names import COLUMNS

hypothesis = pytest.importorskip("hypothesis", reason="properties need hypothesis")
st = hypothesis.strategies

# Bounded and repeatable: a failure is the same on every machine.
bounded = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)

SPECIALS = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
)
ENDS = {
    chatty.CHATML: "<|im_end|>",
    chatty.LLAMA3: "<|eot_id|>",
    chatty.PHI: "<|end|>",
    chatty.GEMMA: "<end_of_turn>",
    chatty.COMMAND: "<|END_OF_TURN_TOKEN|>",
    chatty.COMMAND_NEXT: "<|END_OF_TURN_TOKEN|>",
    chatty.OLMO: "<|endoftext|>",
}
TOK = chatty.tokenizer(SPECIALS, eos="<|endoftext|>", plain=("<think>", "</think>"))

# Words that begin and end with a letter, so that blanks that templates trim are no matter; within
# them anything, special tokens too, which must stay what they are written with.
_letter = st.sampled_from("aZ9é你😀")
_inside = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
        st.sampled_from([*SPECIALS, "\n\n", "  ", "user", "assistant", "</s>", "[INST]"]),
    ),
    max_size=4,
).map("".join)
_words = st.tuples(_letter, _inside, _letter).map("".join)


@st.composite
def conversations(draw):
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(_words)})
        turns.append({"role": "assistant", "content": draw(_words)})
    return tuple(turns)


@bounded
@hypothesis.given(turns=conversations(), template=st.sampled_from(list(ENDS)),
                  train_on=st.sampled_from(["all", "last", "split"]))  # fmt: skip
def test_what_is_trained_is_what_the_assistant_says_and_the_end_of_the_turn(
    turns, template, train_on
):
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    wanted = said[-1:] if train_on == "last" else said
    trained = []
    for _, document in encode_training(TOK, [Conversation(turns, "f:1")], template, train_on):
        edges = np.diff(np.concatenate([[0], document.trained.astype(int), [0]]))
        for first, last in zip(
            np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True
        ):
            trained.append(TOK.decode(document.ids[first:last].tolist()))
            # Words that spell special tokens are no special tokens.
            inside = set(document.ids[first : last - 1].tolist())
            assert not inside & set(TOK.convert_tokens_to_ids(list(SPECIALS)))
    assert trained == [words + ENDS[template] for words in wanted]


NAMES = sorted({name for names in COLUMNS.values() for name in names} - {"messages"})
_columns = st.dictionaries(
    st.one_of(st.sampled_from([*NAMES, "chosen", "rejected"]), st.text("abcXYZ _", min_size=1)),
    st.one_of(st.sampled_from(["yes it is", "no it is not", "why?", ""]), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)


@bounded
@hypothesis.given(extra=_columns, form=st.sampled_from(["sft", "pair", "prompt"]))
def test_every_column_is_used_or_reported(extra, form):
    reader, base = {
        "sft": (to_conversation, {"prompt": "who are you?", "completion": "it is me"}),
        "pair": (to_preference, {"chosen": "yes it is", "rejected": "yes it was"}),
        "prompt": (to_prompt, {"prompt": "who are you?"}),
    }[form]
    row = extra | base
    readings, faults = [], Faults()
    try:
        list(read_examples([row], reader, faults=faults, on_read=readings.append))
    except RowError as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:  # the message names a column of the row
        assert any(str(name).strip() in refused for name in row)
        return
    if faults.dropped:  # the row says that it is not to be trained
        (reason,) = faults.dropped
        assert reason.endswith(": not to be trained")
        assert reason.removesuffix(": not to be trained") in row
        return
    (reading,) = readings
    filled = {name for name, value in row.items() if value not in (None, "", [], {})}
    assert {*reading.columns.values(), *reading.unused} >= filled
    assert {*reading.columns.values(), *reading.unused} <= set(row)
    assert not {*reading.columns.values()} & {*reading.unused}


@bounded
@hypothesis.given(extra=_columns)
def test_ignored_columns_are_neither_read_nor_missed(extra):
    row = {f"theirs {name}": value for name, value in extra.items()}
    row |= {"prompt": "who are you?", "completion": "it is me"}
    columns = {name: "ignore" for name in row if name.startswith("theirs ")}
    readings = []
    list(read_examples([row], to_conversation, columns=columns, on_read=readings.append))
    assert set(readings[0].columns.values()) == {"prompt", "completion"}
    assert readings[0].unused == ()
