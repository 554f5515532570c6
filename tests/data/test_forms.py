"""Every form: what its rows mean, and every real file in its form without a map of columns."""

import gzip
import json

import pytest
from formrows import ROWS, TOOL

from jaxalign.data import (
    Faults,
    Row,
    RowError,
    read_examples,
    to_conversation,
    to_graded,
    to_preference,
    to_prompt,
    to_ranked,
    to_steps,
    to_text,
    to_unpaired,
)


def _read(name, n=0, **options):
    reader, rows = ROWS[name]
    return reader(Row(rows[n], "f:1"), **options)


def _says(messages):
    return [(m["role"], m["content"]) for m in messages]


_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
_WRAPPED = {"type": "function", "function": TOOL}


def test_messages_with_tools():
    talk = _read("messages", 1)
    assert talk.tools == (_WRAPPED,)
    assert _says(talk.messages) == [
        ("user", "Weather in 北京?"),
        ("assistant", ""),
        ("tool", '{"sky": "晴"}'),
        ("assistant", "Sunny, 晴。"),
    ]
    assert talk.messages[1]["tool_calls"] == [{"id": "c1"} | _CALL]
    assert talk.trained_turns() == (1, 3)


def test_sharegpt_becomes_messages():
    talk = _read("sharegpt")
    assert _says(talk.messages) == [
        ("system", "Help."),
        ("user", "Weather?"),
        ("assistant", ""),
        ("tool", '{"sky": "晴"}'),
        ("assistant", "天气很好。"),
    ]
    assert talk.messages[2]["tool_calls"] == [_CALL]
    assert talk.tools == ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    assert _read("sharegpt", 1).tools == ()


def test_parts_and_weights():
    talk = _read("parts")
    assert talk.messages[1]["content"] == "<think>\nTwo and two.\n</think>\n\n4"
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    assert to_conversation(Row({"messages": turns}, "f:1")).trained_turns() == (3,)
    for at, weight, wanted in [(0, 1, "a user turn is marked"), (1, 0.5, "got 0.5, wanted 0 or 1")]:
        bad = [t | ({"weight": weight} if n == at else {}) for n, t in enumerate(turns)]
        with pytest.raises(ValueError, match=rf"f:1: messages\[{at}\].weight: {wanted}"):
            to_conversation(Row({"messages": bad}, "f:1"))


def test_media_are_refused():
    part = {"type": "image_url", "image_url": {"url": "x"}}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"content\[0\].type: got 'image_url', .*only text"):
        to_conversation(Row({"messages": turns}, "f:1"))
    turns[0]["content"] = "<image> what?"
    with pytest.raises(ValueError, match="f:1: images: got a list, wanted a row of text; images"):
        to_conversation(Row({"messages": turns, "images": ["x.png"]}, "f:1"))
    assert to_conversation(Row({"messages": turns, "images": []}, "f:1"))


def test_other_forms_of_sft():
    assert _says(_read("gsm8k").messages) == [("user", "How many?"), ("assistant", "Two.\n#### 2")]
    assert _says(_read("seed_task").messages) == [("user", "Sort\nb a"), ("assistant", "a b")]
    assert _read("completion").trained_from == 1
    row = Row({"text": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"}, "f:1")
    talk = to_conversation(row, form="hh")
    assert [c for _, c in _says(talk.messages)] == ["a", "b", "c", "d"]
    assert to_text(row).text.startswith("Human")


def test_preferences():
    for n in range(3):
        pair = _read("preference", n)
        assert _says(pair.prompt) == [("user", "Hi")]
        assert pair.chosen[0]["content"].startswith("Hello")
    assert _read("preference").margin == 1.5
    pair = _read("hh")
    assert _says(pair.prompt) == [("user", "Hi"), ("assistant", "Yes."), ("user", "Who?")]
    assert _says(pair.chosen + pair.rejected) == [("assistant", "I am."), ("assistant", "Go.")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The answer is four.", "The answer is forty.", "The answer is"),
        ("Q: a?\nA: yes", "Q: a?\nA: yesterday", "Q: a?\nA:"),
        ("问：你好吗？答：我很好", "问：你好吗？答：我不好", "问：你好吗？答："),
        ("a b c", "a b c", "a b"),
        ("a b", "a b c", "a"),
    ],
)
def test_an_implicit_prompt_ends_between_words(chosen, rejected, prompt):
    pair = to_preference(Row({"chosen": chosen, "rejected": rejected}, "f:1"))
    assert pair.prompt[0]["content"] == prompt
    assert prompt + pair.chosen[0]["content"] == chosen
    assert prompt + pair.rejected[0]["content"] == rejected


def test_no_implicit_prompt():
    for chosen, rejected in [("four", "forty"), ("我很好", "我不好"), ("a", "a b")]:
        with pytest.raises(ValueError, match=r"f:1: prompt: missing, .*give the prompt"):
            to_preference(Row({"chosen": chosen, "rejected": rejected}, "f:1"))


def test_scores_become_margins_when_asked():
    row = Row({"prompt": "q", "chosen": "a", "rejected": "b", "s1": 4, "s2": 1.5}, "f:1")
    assert to_preference(row).margin is None
    assert to_preference(row, {"margin": "s1 - s2"}).margin == 2.5
    assert to_preference(row, {"margin": "s1"}).margin == 4
    with pytest.raises(ValueError, match="f:1: columns: got no column 's3', wanted one of prompt"):
        to_preference(row, {"margin": "s1 - s3"})


def test_unpaired():
    first, second = _read("unpaired"), _read("unpaired", 1)
    assert (first.desirable, second.desirable) == (True, False)
    for found, answer in ((first, "Hello"), (second, "No")):
        assert (_says(found.prompt), _says(found.answer)) == (
            [("user", "Hi")],
            [("assistant", answer)],
        )
    with pytest.raises(ValueError, match="f:1: label: got 2, wanted true or false"):
        to_unpaired(Row({"prompt": "q", "completion": "a", "label": 2}, "f:1"))


def test_ranked_graded_and_steps():
    assert _read("ranked").ranks == (-2, -1, -3)  # 1 is the best; larger is better
    assert _read("ranked", 1).ranks == (0.5, -1)
    assert to_ranked(Row(ROWS["preference"][1][0], "f:1")).ranks == (1, 0)
    assert _read("graded").scores == {"helpfulness": 4, "verbosity": 1}
    row = Row({"instruction": "q", "output": "a", "kind": 3, "true": 0.5, "n": None}, "f:1")
    assert to_graded(row, {"scores": "kind, true, n"}).scores == {"kind": 3, "true": 0.5}
    assert _read("steps")[1:3] == (("Two and two", "make 5"), (1, 0))
    for columns, wanted in [
        ({"answers": ["a"], "ranks": [1]}, "answers: got one answer"),
        ({"answers": ["a", "b"], "ranks": [1]}, "ranks: got 1 numbers, wanted one for each of 2"),
    ]:
        with pytest.raises(ValueError, match=f"f:1: {wanted}"):
            to_ranked(Row({"prompt": "q"} | columns, "f:1"))
    with pytest.raises(ValueError, match=r"f:1: labels\[1\]: got 7, wanted a number in \[0, 1\]"):
        to_steps(Row({"prompt": "q", "steps": ["a", "b"], "labels": [1, 7]}, "f:1"))


def test_columns_and_form():
    row = Row({"query": "q", "reply": "a", "prompt": "other"}, "f:1")
    talk = to_conversation(row, {"prompt": "query", "completion": "reply"})
    assert _says(talk.messages) == [("user", "q"), ("assistant", "a")]
    both = Row({"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}, "f:1")
    assert to_conversation(both).messages[0]["content"] == "p"
    with pytest.raises(ValueError, match="columns: got 'promt', wanted our names"):
        to_conversation(row, {"promt": "query"})
    with pytest.raises(ValueError, match="f:1: columns: got no column 'q2', wanted one of query"):
        to_conversation(row, {"prompt": "q2"})
    with pytest.raises(ValueError, match="form: got 'chatgpt', wanted one of messages"):
        to_conversation(row, form="chatgpt")
    with pytest.raises(ValueError, match=r"f:1: got the columns .*wanted conversations \(form 'sh"):
        to_conversation(row, form="sharegpt")


def test_faults_stop_or_are_counted():
    rows = [{"prompt": "q", "completion": c} for c in ("a", "", "b", " ", None)]
    with pytest.raises(RowError, match="row 2: completion: got empty text"):
        list(read_examples(rows, to_conversation))
    faults = Faults("drop")
    assert len(list(read_examples(rows, to_conversation, faults=faults))) == 2
    assert (faults.read, faults.kept) == (5, 2)
    assert faults.dropped == {"completion: empty text": 2, "completion: wanted text": 1}
    assert "dropped 2: completion: empty text (first: row 2: comp" in faults.describe()
    with pytest.raises(ValueError, match="on_error: got 'skip', wanted one of stop, drop"):
        Faults("skip")


# Real files: reader, rows, and what the first row says.
_FILES = {
    "gsm8k/train.jsonl": (to_conversation, 7473),
    "gsm8k/test.jsonl": (to_prompt, 1319),
    "hh-rlhf/harmless-base-test.jsonl.gz": (to_preference, 2312),
    "ifeval/en_input_data.jsonl": (to_prompt, 541),
    "ifeval/es_input_data.jsonl": (to_prompt, 115),
    "ifeval/fr_input_data.jsonl": (to_prompt, 235),
    "ifeval/ja_input_data.jsonl": (to_prompt, 172),
    "llamafactory/alpaca_en_demo.json": (to_conversation, 999),
    "llamafactory/alpaca_zh_demo.json": (to_conversation, 1000),
    "llamafactory/c4_demo.jsonl": (to_text, 300),
    "llamafactory/dpo_en_demo.json": (to_preference, 300),
    "llamafactory/dpo_zh_demo.json": (to_preference, 300),
    "llamafactory/glaive_toolcall_en_demo.json": (to_conversation, 300),
    "llamafactory/glaive_toolcall_zh_demo.json": (to_conversation, 300),
    "llamafactory/identity.json": (to_conversation, 91),
    "llamafactory/kto_en_demo.json": (to_unpaired, 300),
    "llamafactory/reason_tool_use_demo_50.jsonl": (to_conversation, 50),
    "llamafactory/v1_dpo_demo.jsonl": (to_preference, 10),
    "llamafactory/v1_sft_demo.jsonl": (to_conversation, 500),
    "llms-from-scratch/instruction-data-with-preference.json": (to_preference, 1100),
    "llms-from-scratch/instruction-data.json": (to_conversation, 1100),
    "medicalgpt/medical_sft_1K_format.jsonl": (to_conversation, 1000),
    "medicalgpt/sharegpt_zh_1K_format.jsonl": (to_conversation, 1000),
    "stanford-alpaca/seed_tasks.jsonl": (to_conversation, 175),
    "tinystories-sample/tinystories_sample.txt": (to_text, 5),
}
# Two rows of one file cannot be trained: a user who says nothing, and one who gets no answer.
_UNUSABLE = {
    "medicalgpt/sharegpt_zh_1K_format.jsonl": {
        "conversations[].value: empty text": 1,
        "messages: got no assistant turn, wanted at least one to train on": 1,
    }
}


def test_no_real_file_is_forgotten(shared):
    there = {
        str(path.relative_to(shared / "data"))
        for path in (shared / "data").rglob("*")
        if path.name.endswith((".json", ".jsonl", ".jsonl.gz", "sample.txt"))
        and "tokenizer" not in str(path)
    }
    indices = {"llamafactory/dataset_info.json", "stories260K/hf/config.json"}
    assert there - indices == set(_FILES)


@pytest.mark.parametrize("name", _FILES)
def test_real_files_load_in_their_form(shared, name):
    reader, rows = _FILES[name]
    faults = Faults("drop")
    found = list(read_examples(shared / "data" / name, reader, faults=faults))
    assert faults.read == rows
    assert faults.dropped == _UNUSABLE.get(name, {})
    assert len(found) == faults.kept


def test_real_transcripts_lose_no_word(shared):
    file = shared / "data/hh-rlhf/harmless-base-test.jsonl.gz"
    raw = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    names = {"user": "Human", "assistant": "Assistant"}
    for row, pair in zip(raw, read_examples(file, to_preference), strict=True):
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            turns = [f"{names[m['role']]}:{m['content']}" for m in pair.prompt + answer]
            assert "".join("".join(turns).split()) == "".join(row[side].split())
        assert pair.chosen != pair.rejected
