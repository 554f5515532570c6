"""Self-Instruct: the rows it writes, and runs that are killed and continued."""

import itertools
import json

import pytest
import writers
from writers import rows_of

from jaxalign.commands.synth import (
    FunctionWriter,
    InstructConfig,
    Journal,
    RequestFactory,
    Sampling,
    SelfInstruct,
    read_seed_tasks,
)
from jaxalign.data import read_rows, to_conversation
from jaxalign.run.pipeline import EXAMPLES

FACTORY = RequestFactory(7, Sampling(0.7, 1.0, 100))


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


def instruct(out, writer, **options):
    config = InstructConfig(
        seeds=("x",), **({"count": 20, "tasks_per_prompt": 4, "prompts_per_round": 2} | options)
    )
    seeds = read_seed_tasks([str(EXAMPLES / "en" / "seed_tasks.jsonl")])
    journal = Journal(out)
    try:
        run = SelfInstruct(config, seeds, writer, FACTORY, journal, "en")
        run.run()
    finally:
        journal.close()
    return run, journal


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
    requests = sum(request.name.endswith("/tasks") for request in calls)
    assert run.dropped["keyword 'picture'"] + run.dropped["keyword 'draw'"] == requests
    assert run.dropped["instruction of less than 4 words"] == requests
    # Nothing is lost: each of the 6 tasks of a prompt was dropped or went on to be written.
    written = sum(request.name.endswith("/instances") for request in calls)
    before = sum(
        n for why, n in run.dropped.items() if "instr" in why or "keyw" in why or "RO" in why
    )
    assert 6 * requests == before + written


@pytest.mark.parametrize(("human", "machine"), [(1, 0), (3, 1), (2, 4)])
def test_a_prompt_shows_as_many_tasks_of_each_kind_as_set(tmp_path, human, machine):
    options = {"human_examples": human, "machine_examples": machine}
    calls = []
    instruct(tmp_path / "out.jsonl", playing(calls=calls), **options)
    for row in rows_of(tmp_path / "out.jsonl"):
        shown = row["provenance"]["seeds"]
        written = [name for name in shown if name.startswith("round ")]
        assert len(shown) - len(written) == human
        first_round = row["provenance"]["task"].startswith("round 1/")
        assert len(written) == (0 if first_round else machine)
    # The prompts themselves: a numbered list of so many tasks, of which the model continues.
    for request in calls:
        if request.name.endswith("/tasks"):
            tasks = human + (0 if request.name.startswith("round 1/") else machine)
            assert f"numbered from {tasks + 1}." in request.messages[-1]["content"]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_classification_keeps_as_many_labels_as_set(tmp_path, most):
    """The writer gives three labels to every classification."""
    labels = ("warm", "cold", "mild")
    calls = []

    def answer(requests):
        calls.extend(requests)
        for request in requests:
            text = writers.play(request.messages[-1]["content"])
            if text.startswith("Label: warm"):
                text = "\n".join(f"Label: {label}\nInput: a {label} day" for label in labels)
            yield text, "stop"

    writer = FunctionWriter("player", lambda requests: list(answer(requests)), 3)
    out = tmp_path / "out.jsonl"
    run, _ = instruct(out, writer, form="alpaca", count=40, max_labels=most)
    tasks = {}
    for row in rows_of(out):
        if row["provenance"]["classification"]:
            tasks.setdefault(row["provenance"]["task"], []).append(row["output"])
    *whole, _ = tasks.values()  # the last one may end with the run
    assert len(whole) > 1
    assert all(outputs == list(labels[:most]) for outputs in whole)
    requests = [r for r in calls if "a classification. Name" in r.messages[-1]["content"]]
    assert requests
    assert all(f"up to {most} of them" in r.messages[-1]["content"] for r in requests)
    dropped = run.dropped["more labels than max_labels"]
    assert dropped == (len(labels) - most) * len(requests)


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
        factory = RequestFactory(seed, FACTORY.sampling)
        SelfInstruct(config, seeds, playing(calls=calls), factory, journal, "en").run()
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
    assert journal.resumed[2]
    replies = (tmp_path / "out.jsonl.journal").read_text().splitlines()
    assert len(replies) == len({json.loads(line)["request"] for line in replies})
    assert sorted(replies) == sorted((tmp_path / "whole.jsonl.journal").read_text().splitlines())
    assert journal.requested <= len(replies) - stop_after + 3  # a group of 3 may be half kept


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
    assert journal.requested == 0
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
