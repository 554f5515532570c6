"""Hostile files of rows and JSON: an error that says what to do, in bounded time and memory."""

import gzip
import json
import os
import stat

import chatty
import pytest

from jaxalign.data import RowError, files, read_rows, sft_batches
from jaxalign.data.bounds import (
    check_plain,
    check_plain_folder,
    parse_json,
    read_json_file,
    repeated,
)
from jaxalign.data.options import BatchOptions

DEEP = "[" * 100_000 + "]" * 100_000
DEEP_ENOUGH = '{"a": ' * 101 + "1" + "}" * 101  # what Python would still read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested more than 100 deep"),
        (DEEP_ENOUGH, "nested more than 100 deep"),
        ("9" * 5000, "a number of 5000 digits, wanted at most 300"),
        ('{"a": -' + "9" * 400 + "}", "a number of 401 digits"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
        ("{", "Expecting property name"),
    ],
)
def test_json_beyond_the_bounds(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_within_the_bounds():
    wide = [[{"a": [n]}] for n in range(200)]
    assert parse_json(json.dumps(wide)) == wide
    deep = json.loads('{"a": ' * 100 + "1" + "}" * 100)
    assert parse_json(json.dumps(deep).encode()) == deep
    assert parse_json("9" * 300) == int("9" * 300)


def test_names_given_twice():
    names = [str(n) for n in range(200_000)]
    assert repeated([*names, "7", "3", "7"]) == ["3", "7"]


def test_a_row_of_many_keys_with_one_twice(tmp_path):
    keys = ", ".join(f'"{n}": 0' for n in range(200_000))
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{{keys}, "199999": 1}}\n{{"prompt": "p"}}\n')
    bad, good = files.read_file(file)
    assert isinstance(bad, RowError)
    assert "the key '199999' is given twice in an object; keep one of them" in str(bad)
    assert good.data == {"prompt": "p"}


@pytest.mark.parametrize("form", ["{0}\n{1}\n", "[{0},\n{1}]"])
def test_a_deep_row_leaves_the_others(tmp_path, form):
    file = tmp_path / "a.json"
    file.write_text(form.format(DEEP_ENOUGH, '{"prompt": "p"}'))
    bad, good = files.read_file(file)
    assert isinstance(bad, RowError)
    assert "unreadable JSON: lists and objects nested more than 100 deep; correct" in str(bad)
    assert good.data == {"prompt": "p"}


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.jsonl.gz", '{"a": 1}\n{"a": "' + "x" * 2000 + '"}\n', 2),
        ("a.json.gz", '[{"a": 1},\n' + '{"a": 1},\n' * 200 + "{}]", 100),
        ("a.txt.gz", "nine byte\n" * 200, 101),
        ("a.csv.gz", "a,b\n" + "x" * 2000 + ",1\n", 2),
    ],
)
def test_what_gzip_unpacks_to_is_bounded(tmp_path, monkeypatch, name, text, line):
    monkeypatch.setattr(files, "MAX_UNPACKED", 1000)
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()))
    message = rf"{name}:{line}: unpacks to more than 1,000 bytes in one piece; unpack the file"
    with pytest.raises(ValueError, match=message):
        list(files.read_file(file))


def test_plain_files_may_have_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED", 1000)
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "' + "x" * 2000 + '"}\n')
    assert len(read_rows(file)[0].data["a"]) == 2000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet", "a.csv", "a.txt"])
def test_a_pipe_is_refused_before_it_is_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a named pipe, wanted a file; write its"):
        read_rows(tmp_path / name)


def test_devices_and_links_to_them(tmp_path):
    link = tmp_path / "config.json"
    link.symlink_to("/dev/zero")
    assert stat.S_ISCHR(link.stat().st_mode)
    for check in (check_plain, read_json_file):
        with pytest.raises(ValueError, match=r"config\.json is a device, wanted a file"):
            check(link)
    with pytest.raises(ValueError, match=r"config\.json is a device"):
        check_plain_folder(tmp_path)
    link.unlink()
    link.symlink_to(tmp_path / "nothing")  # who opens it says that it is not there
    check_plain_folder(tmp_path)


def test_json_files_have_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxalign.data.bounds.MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(ValueError, match=r"a\.json has 12 bytes, wanted at most 10"):
        read_json_file(tmp_path / "a.json")


SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_an_error_of_its_row():
    tok = chatty.tokenizer(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    rows = [{"prompt": "hi", "completion": "you"}]
    options = {"rows": 1, "length": 64, "chat_template": SLOW + chatty.CHATML}
    with pytest.raises(ValueError, match=r"row 1: the chat template took more than 0\.05 s"):
        sft_batches(rows, tok, template_timeout=0.05, **options)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_time_limit_for_templates_is_positive(seconds):
    with pytest.raises(ValueError, match="template_timeout: got"):
        BatchOptions(template_timeout=seconds)
