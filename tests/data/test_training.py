"""What is trained: by `train_on`, under templates that rewrite turns, with tools, in real data."""

import copy
import itertools
import json

import numpy as np
import pytest
from formrows import ROWS

from jaxalign.data import (
    Conversation,
    Faults,
    Row,
    Steps,
    encode_conversations,
    encode_prompts,
    encode_steps,
    encode_texts,
    encode_training,
    read_examples,
    to_conversation,
)

_TURNS = (
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "再见"},
    {"role": "assistant", "content": "再见！"},
    {"role": "user", "content": "bye"},
)
_TALK = Conversation(_TURNS, "f:1")


def _said(tok, documents):
    """What is trained in each document, passage by passage."""
    found = []
    for _, (ids, trained) in documents:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
        found.append([tok.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)])
    return found


def test_train_on(tiny):
    one, two = "One.<|im_end|>", "再见！<|im_end|>"
    assert _said(tiny, encode_training(tiny, [_TALK])) == [[one, two]]
    assert _said(tiny, encode_training(tiny, [_TALK], train_on="last")) == [[two]]
    split = encode_training(tiny, [_TALK, _TALK], train_on="split")
    assert [row for row, _ in split] == [0, 0, 1, 1]
    assert _said(tiny, split) == [[one], [two]] * 2
    header = "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.decode(split[0][1].ids) == f"{header}{one}\n"
    ((_, (ids, trained)),) = encode_training(tiny, [_TALK], train_on="everything")
    assert trained.all()
    assert tiny.decode(ids) == tiny.apply_chat_template(list(_TURNS), tokenize=False)
    with pytest.raises(ValueError, match="train_on: got 'first', wanted one of all, last, split"):
        encode_training(tiny, [_TALK], train_on="first")


def test_context_stays_untrained_under_every_construction(tiny):
    answer = "再见！<|im_end|>"
    for talk in (_TALK._replace(trained_from=2), _TALK._replace(untrained=(1,))):
        for train_on in ("all", "last", "split"):
            assert _said(tiny, encode_training(tiny, [talk], train_on=train_on)) == [[answer]]


def test_a_rewritten_answer_gets_the_document_in_which_it_was_said(real):
    """Under Qwen3 an earlier answer stands without the empty block that generation puts there."""
    tok = real["qwen3"]
    documents = encode_training(tok, [_TALK])
    assert [tok.decode(d.ids) for _, d in documents] == [
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "One.<|im_end|>\n",
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\n再见<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "再见！<|im_end|>\n",
    ]
    assert _said(tok, documents) == [["One.<|im_end|>"], ["再见！<|im_end|>"]]
    thoughtful = [dict(turn) for turn in _TURNS[:4]]
    thoughtful[1]["content"] = "<think>\nearly\n</think>\n\nOne."
    thoughtful[3]["reasoning_content"] = "late"
    documents = encode_training(tok, [Conversation(tuple(thoughtful), "f:1")])
    assert sorted(_said(tok, documents)) == [
        ["<think>\nearly\n</think>\n\nOne.<|im_end|>"],
        ["<think>\nlate\n</think>\n\n再见！<|im_end|>"],
    ]
    assert sorted("early" in tok.decode(d.ids) for _, d in documents) == [False, True]


# As DeepSeek-R1's: generation starts inside the reasoning, and no turn ever shows it.
_DROPS_REASONING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ 'A:' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}{{ 'U:' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:<think>\n' }}{% endif %}"
)


def test_reasoning_that_a_template_drops_is_put_back(tiny):
    turns = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "no"},
    )
    documents = encode_training(tiny, [Conversation(turns, "f:1")], _DROPS_REASONING)
    assert [tiny.decode(d.ids) for _, d in documents] == [
        "U:qA:<think>\nhm\n</think>\n\nyes<|im_end|>",
        "U:qA:\n\nyes<|im_end|>U:rA:<think>\n\n</think>\n\nno<|im_end|>",
    ]
    assert _said(tiny, documents) == [
        ["hm\n</think>\n\nyes<|im_end|>"],
        ["\n</think>\n\nno<|im_end|>"],
    ]


def test_an_answer_that_a_template_would_cut_is_an_error(real):
    turns = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\na\n</think>\n\nb</think>"},
    )
    with pytest.raises(ValueError, match=r"f:1: .*leaves out a part of what messages\[1\]"):
        encode_training(real["qwen3"], [Conversation(turns, "f:1")])


def test_reasoning_apart_is_written_where_the_template_knows_no_such_field(tiny):
    turns = [dict(turn) for turn in _TURNS[:2]]
    turns[1]["reasoning_content"] = "hm"
    documents = encode_training(tiny, [Conversation(tuple(turns), "f:1")])
    assert _said(tiny, documents) == [["<think>\nhm\n</think>\n\nOne.<|im_end|>"]]


def test_tools_that_a_template_would_leave_out_are_an_error(tiny):
    talk = to_conversation(Row(ROWS["messages"][1][1], "f:1"))
    with pytest.raises(ValueError, match=r"f:1: tools: the row has a list of tools, .*'chatml'"):
        encode_training(tiny, [talk])
    with pytest.raises(ValueError, match="f:1: tools: the row has a call of a tool"):
        encode_training(tiny, [talk._replace(tools=())])
    faults = Faults("drop")
    assert encode_training(tiny, [talk, _TALK], on_fault=faults)[0][0] == 1
    assert faults.dropped == {"the chat template takes no tools": 1}
    assert [len(d.ids) > 0 for d in encode_conversations(tiny, [talk, _TALK], on_fault=faults)] == [
        False,
        True,
    ]
    ((called, answered),) = _said(tiny, encode_training(tiny, [talk], "chatml"))
    opening, call, closing = called.split("\n")
    assert (opening, closing) == ("<tool_call>", "</tool_call><|im_end|>")
    assert json.loads(call) == {"name": "weather", "arguments": {"city": "北京"}}
    assert answered == "Sunny, 晴。<|im_end|>"


def test_alpaca_template(tiny):
    talk = to_conversation(Row(ROWS["alpaca"][1][0], "f:1"))
    ((_, (ids, trained)),) = encode_training(tiny, [talk], "alpaca")
    assert tiny.decode(ids) == "### Instruction:\nSay hi\n\n### Response:\nHi.<|im_end|>\n\n"
    assert tiny.decode(ids[trained]) == "Hi.<|im_end|>"
    own = copy.deepcopy(tiny)
    own.bos_token = "<|im_start|>"
    ((_, (ids, _)),) = encode_training(own, [talk], "alpaca")
    assert own.decode(ids).startswith("<|im_start|>### Instruction:")
    tools = to_conversation(Row(ROWS["messages"][1][1], "f:1"))
    with pytest.raises(ValueError, match="f:1: tools: the row has a list of tools"):
        encode_training(tiny, [tools], "alpaca")


def test_texts(tiny):
    ids, trained = encode_texts(tiny, ["Hello there", "你好"])[1]
    assert tiny.decode(ids) == "你好<|im_end|>"
    assert trained.all()


@pytest.mark.parametrize("template", [None, "none"])
def test_steps_end_where_their_last_character_is(tiny, template):
    prompt = ({"role": "user", "content": "2 + 2?"},)
    example = Steps(prompt, ("Two, and two", "两个", "two, and two"), (1, 1, 0), "f:1")
    ((ids, trained, ends),) = encode_steps(tiny, [example], template)
    begin = int(np.argmax(trained))
    ended = [tiny.decode(ids[begin : end + 1]) for end in ends]
    assert ended == [
        "Two, and two",
        "Two, and two\n两个",
        "Two, and two\n两个\ntwo, and two",
    ]
    assert tiny.decode(ids[trained]) == ended[-1] + "<|im_end|>"


# Real conversations, against a search token by token that knows nothing of how spans are found.


def _search(tok, ids):
    """(first, end) of every answer: after a header (and an empty block), through the end token."""
    header = tok.encode("<|im_start|>assistant\n", add_special_tokens=False)
    empty = tok.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    found = []
    for at in range(len(ids)):
        if ids[at : at + len(header)] == header:
            here = at + len(header)
            here += len(empty) if ids[here : here + len(empty)] == empty else 0
            found.append((here, ids.index(stop, here) + 1))
    return found


def _read_back(text):
    """The content and the calls of an answer as ChatML templates write it."""
    content, *calls = text.removesuffix("<|im_end|>").split("<tool_call>\n")
    made = [json.loads(call.removesuffix("\n").removesuffix("\n</tool_call>")) for call in calls]
    return content.strip(), made


@pytest.mark.parametrize("name", ["smollm2", "minimind", "qwen3"])
@pytest.mark.parametrize(
    "file",
    [
        "llamafactory/glaive_toolcall_en_demo.json",
        "llamafactory/glaive_toolcall_zh_demo.json",
        "medicalgpt/sharegpt_zh_1K_format.jsonl",
    ],
)
def test_real_conversations(real, shared, name, file):
    tok = real[name]
    talks = read_examples(shared / "data" / file, to_conversation, faults=Faults("drop"))
    talks = list(itertools.islice((t for t in talks if 3 < len(t.messages) < 9), 10))
    template = "chatml" if name == "smollm2" and "tool" in file else None
    documents = encode_training(tok, talks, template)
    spoken = {n: [] for n in range(len(talks))}
    for row, (ids, trained) in documents:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
        runs = [tuple(edge) for edge in edges.reshape(-1, 2).tolist()]
        assert set(runs) <= set(_search(tok, ids.tolist()))
        for first, end in runs:
            spoken[row].append((_read_back(tok.decode(ids[first:end])), ids[:first].tolist()))
    for row, talk in enumerate(talks):
        wanted = []
        for at in talk.trained_turns():
            message = talk.messages[at]
            calls = [call["function"] for call in message.get("tool_calls", [])]
            # The tokens before the answer are those that generation would start from.
            (prompt,) = encode_prompts(tok, [talk.messages[:at]], template, tools=[talk.tools])
            wanted.append(((message["content"].strip(), calls), prompt.tolist()))
        assert sorted(spoken[row], key=lambda x: len(x[1])) == wanted
    # In one document a conversation, every answer is found as well, where later turns leave it.
    for talk, (ids, trained) in zip(talks, encode_conversations(tok, talks, template), strict=True):
        mask = np.zeros(len(ids), bool)
        for first, end in _search(tok, ids.tolist()):
            mask[first:end] = True
        assert trained.tolist() == mask.tolist()
        assert len(_search(tok, ids.tolist())) == len(talk.trained_turns())
