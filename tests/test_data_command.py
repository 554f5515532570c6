"""`jaxalign data`: what is shown is what is trained, against text written by hand."""

import json
import xml.dom.minidom

import chatmodel
import numpy as np
import pytest
import yaml

import jaxalign
from jaxalign.commands import cli
from jaxalign.commands.report.data import (
    groups_of,
    histogram,
    inspect_data,
    marked,
    printable,
    show,
    write_page,
)
from jaxalign.run.pipeline import EXAMPLES
from jaxalign.types import RankedBatch, SharedPairBatch, StepBatch, TokenBatch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer and no model at all."""
    folder = tmp_path_factory.mktemp("tokenizer")
    chatmodel.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _no_models(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("jaxalign.run.tasks.loader.load_pretrained", refuse)


def values(tokenizer, algorithm, train, **data):
    given = {"train": train, "rows": 4, "length": 256, "shuffle": False} | data
    result = {"model": {"source": tokenizer}, "data": given, "run": {"folder": "runs/never"}}
    result[algorithm] = {}
    return result | ({"reward_model": "runs/none"} if algorithm == "ppo" else {})


def config(tmp_path, *arguments, **data):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(*arguments, **data)), encoding="utf-8")
    return str(path)


def rows(tmp_path, name, *items):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in items), encoding="utf-8")
    return str(path)


TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "more?"},
        {"role": "assistant", "content": "yes"},
    ]
}
TWO_TURNS_SHOWN = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ok<|im_end|>⟧\n"
    "<|im_start|>user\nmore?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
)
CHINESE = {"prompt": "你是谁？", "completion": "我是助手。"}
CHINESE_SHOWN = (
    "<|im_start|>user\n你是谁？<|im_end|>\n<|im_start|>assistant\n⟦我是助手。<|im_end|>⟧\n"
)


@pytest.mark.parametrize("packing", [False, True])
def test_brackets_stand_exactly_around_what_is_trained(tokenizer, tmp_path, capsys, packing):
    train = [rows(tmp_path, "two.jsonl", TWO_TURNS), rows(tmp_path, "zh.jsonl", CHINESE)]
    path = config(tmp_path, tokenizer, "sft", train, packing=packing)
    assert cli.main(["data", path]) == 0
    told = capsys.readouterr().out
    assert "training data of sft" in told
    assert f"--- 1\n{TWO_TURNS_SHOWN}--- 2\n{CHINESE_SHOWN}" in told
    assert "in ⟦ ⟧" in told
    assert "\x1b" not in told
    # By hand: 1+5+2+1+1, 1+10+2+1+1, 1+5+5+1+1, 1+10+3+1 tokens; 1+5+12+1+1 and 1+10+15+1.
    assert "Lengths: 2 documents, 47 to 53 tokens, median 50\n" in told
    assert "2 rows read, 2 kept, 0 cut to 256 tokens, 0 dropped" in told


@pytest.mark.parametrize(
    ("language", "shown"),
    [
        (
            "en",
            "<|im_start|>user\nWhy does bread dough need time to rise?<|im_end|>\n"
            "<|im_start|>assistant\n⟦Yeast makes gas as it feeds on the flour, and that gas makes "
            "the dough light.<|im_end|>⟧\n",
        ),
        (
            "zh",
            "<|im_start|>user\n煮米饭一般放多少水？<|im_end|>\n<|im_start|>assistant\n"
            "⟦米和水的体积比大约一比一点二，新米可以少放一点水。<|im_end|>⟧\n",
        ),
    ],
)
def test_the_example_data(tokenizer, tmp_path, capsys, language, shown):
    folder = EXAMPLES / language
    path = config(
        tmp_path,
        tokenizer,
        "sft",
        [str(folder / "conversations.jsonl")],
        eval=[str(folder / "conversations_heldout.jsonl")],
        length=512,
        packing=False,  # in the order of the file
    )
    assert cli.main(["data", path, "--examples", "1"]) == 0
    told = capsys.readouterr().out
    assert f"--- 1\n{shown}" in told
    assert told.index("training data of sft") < told.index("held-out data of sft")
    assert told.count("--- ") == 2


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"shared_prefix": True}])
def test_pairs_show_both_answers(tokenizer, tmp_path, capsys, options):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    train = [rows(tmp_path, "pairs.jsonl", pair, pair)]
    path = config(tmp_path, tokenizer, "dpo", train, **options)
    assert cli.main(["data", path, "--examples", "1"]) == 0
    told = capsys.readouterr().out
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert f"--- 1 chosen\n{head}⟦good<|im_end|>⟧\n--- 1 rejected\n{head}⟦bad<|im_end|>⟧\n" in told
    assert "Lengths: 4 documents" in told


def test_prompts_have_nothing_that_is_trained(tokenizer, tmp_path, capsys):
    train = [rows(tmp_path, "p.jsonl", {"prompt": "one"}, {"prompt": "two"})]
    assert cli.main(["data", config(tmp_path, tokenizer, "ppo", train)]) == 0
    told = capsys.readouterr().out
    assert "--- 1\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n\n--- 2" in told
    assert told.count("⟦") == 1  # in the explanation


def test_cuts_drops_and_sources_are_told(tokenizer, tmp_path, capsys):
    long = {"prompt": "q", "completion": "x" * 99}
    late = {"prompt": "q" * 99, "completion": "x"}
    train = [rows(tmp_path, "a.jsonl", long, CHINESE, late), rows(tmp_path, "b.jsonl", CHINESE)]
    assert cli.main(["data", config(tmp_path, tokenizer, "sft", train, length=64)]) == 0
    told = capsys.readouterr().out
    assert "4 rows read, 3 kept, 1 cut to 64 tokens, 1 dropped" in told
    assert "dropped 1: the answer begins beyond 64 tokens" in told
    assert told.count("rows read") == 1
    heads, *lines = [line.split() for line in told.partition("source ")[2].splitlines()[:3]]
    assert heads == ["read", "kept", "dropped", "cut", "tokens", "trained"]
    # 64 + 47 tokens, and 47; trained 64 − 20, and twice the 15 + 1 of "我是助手。" and its end.
    assert [line[1:] for line in lines] == [
        ["3", "2", "1", "1", "111", "60"],
        ["1", "1", "0", "0", "47", "16"],
    ]
    # The head takes 1+5+1+1+1 and 1+10 tokens.
    assert f"⟦{'x' * 44}⟧" in told  # the end is gone, and with it the end token


def test_endless_epochs_are_shown_once(tokenizer, tmp_path):
    given = values(tokenizer, "sft", [rows(tmp_path, "a.jsonl", CHINESE)], epochs=None)
    given["run"]["steps"] = 5
    assert inspect_data(given)[0].lengths == [47]


def test_what_is_held_out_of_the_training_data_is_shown(tokenizer, tmp_path):
    items = [{"prompt": f"question {n}", "completion": "yes"} for n in range(8)]
    given = values(tokenizer, "sft", [rows(tmp_path, "a.jsonl", *items)], validation=2)
    train, held_out = inspect_data(given, examples=8)
    assert (len(train.examples), len(held_out.examples)) == (6, 2)
    assert held_out.title == "held-out data of sft"


def test_data_that_streams(tokenizer, tmp_path):
    train = [rows(tmp_path, "a.jsonl", *[TWO_TURNS] * 9)]
    given = values(tokenizer, "sft", train, streaming=True, packing=False)
    given["run"]["steps"] = 1
    view = inspect_data(given)[0]
    assert view.lengths == [53] * 9
    assert view.sources["a"]["kept"] == 9
    line = "a: 9 rows as messages; messages → messages"
    assert view.summary.count(line) == 1
    shown = write_page([view], tmp_path / "data.html").read_text(encoding="utf-8")
    assert line in shown


def test_the_first_batches_only(tokenizer, tmp_path):
    given = values(tokenizer, "sft", [rows(tmp_path, "a.jsonl", *[TWO_TURNS] * 9)], packing=False)
    view = inspect_data(given, examples=9, most=2)[0]
    assert view.lengths == [53] * 8  # 4 rows a batch
    assert len(view.examples) == 8


def test_colour_for_terminals(tokenizer, tmp_path):
    view = inspect_data(values(tokenizer, "sft", [rows(tmp_path, "a.jsonl", CHINESE)]))[0]
    told = show(view, colour=True)
    assert "\x1b[1;32m我是助手。<|im_end|>\x1b[0m" in told
    assert "⟦" not in told
    assert marked([("a\nb", True)], True) == "\x1b[1;32ma\x1b[0m\n\x1b[1;32mb\x1b[0m"


def test_data_cannot_steer_the_terminal(tokenizer, tmp_path):
    row = {"prompt": "q", "completion": "red\x1b[31m\rgone\ttab"}
    view = inspect_data(values(tokenizer, "sft", [rows(tmp_path, "a.jsonl", row)]))[0]
    assert "⟦red\\x1b[31m\\rgone\ttab<|im_end|>⟧" in show(view, colour=False)
    assert printable("好\x07\n") == "好\\x07\n"


def test_the_page(tokenizer, tmp_path, capsys):
    row = {"prompt": "a < b & \x01?", "completion": "<b>yes</b>"}
    train = [rows(tmp_path, "a.jsonl", row, CHINESE)]
    out = tmp_path / "deep" / "page.html"
    path = config(tmp_path, tokenizer, "sft", train, packing=False)
    assert cli.main(["data", path, "--html", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text(encoding="utf-8")
    tree = xml.dom.minidom.parseString(page.removeprefix("<!DOCTYPE html>\n"))
    marks = [node.firstChild.data for node in tree.getElementsByTagName("mark")]
    assert sorted(marks) == ["<b>yes</b><|im_end|>", "what is trained", "我是助手。<|im_end|>"]
    shown = [pre for pre in tree.getElementsByTagName("pre") if pre.getAttribute("class") == "doc"]
    said = "".join(
        node.firstChild.data if node.nodeName == "mark" else node.data
        for node in shown[1].childNodes
    )
    assert said == CHINESE_SHOWN.replace("⟦", "").replace("⟧", "").rstrip("\n")
    bars = tree.getElementsByTagName("rect")
    counts = [bar.getElementsByTagName("title")[0].firstChild.data for bar in bars]
    assert sum(int(tip.rsplit(" ", 1)[1]) for tip in counts) == 2
    assert "http" not in page.replace("http://www.w3.org", "")


def test_bins_by_hand():
    # A span of 67 in at most 12 bins: 10 is the first of 1, 2, 5, 10 that is 67/12 or more.
    assert histogram([9, 40, 41, 75]) == (
        [(0, 9), (10, 19), (20, 29), (30, 39), (40, 49), (50, 59), (60, 69), (70, 79)],
        [1, 0, 0, 0, 2, 0, 0, 1],
    )
    assert histogram([5, 5]) == ([(5, 5)], [2])
    assert histogram([]) == ([], [])


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        ({}, ["--as", "dpo"], "sft: unknown key"),
        ({"sft": None}, [], "got no section of an algorithm"),
        ({"dpo": {}}, [], "got sft and dpo"),
        ({"stages": [], "sft": None}, [], "this is a pipeline"),
        ({}, ["--batches", "0"], "batches=0: wanted 1 or more"),
        ({}, ["--examples", "-1"], "examples=-1: wanted 0 or more"),
    ],
)
def test_what_is_wrong_is_told(tokenizer, tmp_path, capsys, change, arguments, told):
    given = values(tokenizer, "sft", [rows(tmp_path, "a.jsonl", CHINESE)]) | change
    given = {name: value for name, value in given.items() if value is not None}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    assert cli.main(["data", str(path), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_the_algorithm_can_be_named(tokenizer, tmp_path, capsys):
    given = values(tokenizer, "sft", [rows(tmp_path, "a.jsonl", CHINESE)])
    del given["sft"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    assert cli.main(["data", str(path), "--as", "sft", "data.rows=2"]) == 0
    assert CHINESE_SHOWN in capsys.readouterr().out


# Batches of other kinds


def token_batch(inputs, segments, trained, branches=None):
    """`trained` marks targets: the tokens themselves, one place later."""
    mask = np.zeros(np.shape(inputs), bool)
    mask[..., :-1] = np.asarray(trained, bool)[..., 1:]
    zero = np.zeros(np.shape(inputs), np.int32)
    fields = [np.asarray(inputs), zero, zero, np.asarray(segments), mask]
    return TokenBatch(*fields, None if branches is None else np.asarray(branches))


def plain(batch):
    return [
        [(d.name, d.ids.tolist(), d.trained.astype(int).tolist()) for d in group]
        for group in groups_of(batch)
    ]


def test_packed_rows_fall_into_their_documents():
    batch = token_batch([[1, 2, 3, 4, 5, 0]], [[1, 1, 1, 2, 2, 0]], [[0, 1, 1, 0, 1, 0]])
    assert plain(batch) == [[("", [1, 2, 3], [0, 1, 1])], [("", [4, 5], [0, 1])]]


def test_pairs_that_share_their_prompt_fall_apart():
    # Prompt 1 2 (2 stands at the head of either branch), chosen 3 4, rejected 5.
    batch = token_batch([[1, 2, 3, 4, 2, 5]], [[1] * 6], [[0, 0, 1, 1, 0, 1]], [[0, 1, 1, 1, 2, 2]])
    assert plain(SharedPairBatch(batch)) == [
        [("chosen", [1, 2, 3, 4], [0, 0, 1, 1]), ("rejected", [1, 2, 5], [0, 0, 1])]
    ]


def test_ranked_and_step_batches():
    answers = token_batch([[[1, 2], [3, 0]]], [[[1, 1], [1, 0]]], [[[0, 1], [0, 0]]])
    ranks = np.zeros((1, 2))
    expected = [[("", [1, 2], [0, 1])], [("", [3], [0])]]
    assert plain(RankedBatch(answers, ranks, ranks > 0)) == expected
    tokens = token_batch([[1, 2]], [[1, 1]], [[0, 1]])
    assert plain(StepBatch(tokens, ranks, ranks > 0)) == [[("", [1, 2], [0, 1])]]


@pytest.mark.parametrize(
    ("algorithm", "options", "row", "shown"),
    [
        ("kto", {}, {"prompt": "hi", "completion": "ok", "label": True}, 1),
        (
            "reward",
            {"objective": "ranking"},
            {"prompt": "hi", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]},
            3,
        ),
    ],
    ids=["kto", "ranking"],
)
def test_answers_that_are_no_pairs(tokenizer, tmp_path, algorithm, options, row, shown):
    path = rows(tmp_path, "rows.jsonl", *[row] * 4)
    given = values(tokenizer, algorithm, [path]) | {algorithm: options}
    if shown > 1:
        given["answers"] = shown
    (view,) = inspect_data(given, examples=100)
    assert sum(map(len, view.examples)) == 4 * shown


def test_the_command_and_training_read_the_same(tokenizer, tmp_path):
    """Lengths against the batch functions themselves."""
    sources = [str(EXAMPLES / "en" / "preferences.jsonl")]
    view = inspect_data(values(tokenizer, "reward", sources, packing=True))[0]
    tok = jaxalign.load_tokenizer(tokenizer)
    stats = jaxalign.preference_batches(sources, tok, rows=4, length=256, packing=True).stats
    assert sum(view.lengths) == stats["tokens"]
    assert len(view.lengths) == 2 * stats["kept"]
