"""Reading files: every row with its origin, every fault with file, line and remedy."""

import gzip
import json
import sys
import types

import pytest

from jaxalign.data import Row, read_rows


def _write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_jsonl_counts_lines_and_keeps_unicode_separators(tmp_path):
    file = _write(tmp_path / "a.jsonl", '{"prompt": "a\u2028b"}\r\n\n  \n{"prompt": "c"}')
    assert read_rows(file) == [
        Row({"prompt": "a\u2028b"}, f"{file}:1"),
        Row({"prompt": "c"}, f"{file}:4"),
    ]


def test_a_list_a_byte_order_mark_and_gzip(tmp_path):
    rows = [{"prompt": "x"}, {"prompt": "你好"}]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    plain = _write(tmp_path / "a.json", b"\xef\xbb\xbf" + text.encode())
    packed = _write(tmp_path / "b.json.gz", gzip.compress(text.encode(), mtime=0))
    for file in (plain, packed):
        expected = [
            Row(row, f"{file}:{3 * n - 1} (row {n})") for n, row in enumerate(rows, start=1)
        ]
        assert read_rows(file) == expected


def test_folder_glob_list_and_rows(tmp_path):
    (tmp_path / "sub").mkdir()
    _write(tmp_path / "b.jsonl", '{"n": 2}')
    _write(tmp_path / "a.json", '[{"n": 1}]')
    _write(tmp_path / "sub" / "c.ndjson", '{"n": 3}')
    _write(tmp_path / "readme.txt", "no rows")

    def numbers(sources):
        return [row.data["n"] for row in read_rows(sources)]

    assert numbers(tmp_path) == [1, 2, 3]
    assert numbers(str(tmp_path / "*.json*")) == [1, 2]
    assert numbers(str(tmp_path / "**" / "*.ndjson")) == [3]
    assert numbers([tmp_path / "b.jsonl", {"n": 9}, str(tmp_path / "a.json")]) == [2, 9, 1]
    assert read_rows({"n": 9}) == [Row({"n": 9}, "row 1")]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', r"a\.jsonl:2: malformed JSON: .*column.*remove"),
        ("a.jsonl", '{"a": 1}\n{"a": tru}\n', r"a\.jsonl:2: malformed JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl:2: got \[1, 2\], wanted an object"),
        ("a.jsonl", '"text"\n', r'a\.jsonl:1: got "text", wanted an object'),
        ("a.jsonl", '{"a": 1}\nnull\n', r"a\.jsonl:2: got null, wanted an object"),
        ("a.jsonl", "{}\n", r"a\.jsonl:1: got an empty object"),
        ("a.jsonl", "", r"a\.jsonl: the file is empty; write"),
        ("a.jsonl", " \n\n", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: invalid UTF-8 \(byte 0xff.*save"),
        ("a.jsonl", '{"a": ' + "[" * 200_000, r"a\.jsonl:1: (unreadable|malformed) JSON"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl:1: unreadable JSON"),
        ("a.json", "[]", r"a\.json: the list is empty"),
        ("a.json", '[{"a": 1},\n 3]', r"a\.json:2 \(row 2\): got 3, wanted an object"),
        ("a.json", '[{"a": 1},\n {"a": 2},\n]', r"a\.json:[23]: malformed JSON"),
        ("a.json", b'[{"a": 1},\n {"a": "\xe4"}]', r"a\.json:2: invalid UTF-8"),
        ("a.json.gz", b"no gzip", r"a\.json\.gz: cannot be read .*check"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9],
            r"a\.jsonl\.gz: cannot be read",
        ),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read after row 0 .*check or re-create"),
        ("a.arrow", b"PAR1", r"a\.arrow: got a file of unknown type, wanted \.json"),
    ],
)
def test_faults_name_file_line_and_remedy(tmp_path, name, content, wanted):
    file = _write(tmp_path / name, content)
    with pytest.raises(ValueError, match=wanted):
        read_rows(file)


def test_missing_sources(tmp_path):
    for source, wanted in [
        (tmp_path / "no.jsonl", "no.jsonl: no such file or folder"),
        ("no/such.jsonl", "no/such.jsonl: no such file"),
        (str(tmp_path / "*.jsonl"), "no file matches"),
        (tmp_path, "the folder holds no"),
        ([], "sources: got an empty list"),
        ([3], "sources: got int"),
        (None, "sources: got NoneType"),
    ]:
        with pytest.raises(ValueError, match=wanted):
            read_rows(source)


def test_hub_goes_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "no/such":
            raise ConnectionError("offline")
        return [{"prompt": "a", "chosen": None}, {"prompt": "b", "chosen": "c"}]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_rows("some/set") == [
        Row({"prompt": "a"}, "some/set: row 1"),
        Row({"prompt": "b", "chosen": "c"}, "some/set: row 2"),
    ]
    read_rows("some/set:test[:5]")
    assert asked == [("some/set", "train"), ("some/set", "test[:5]")]
    with pytest.raises(ValueError, match=r"no/such: neither a file .*ConnectionError: offline"):
        read_rows("no/such")


def test_files_need_no_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would raise
    assert len(read_rows(_write(tmp_path / "a.jsonl", '{"a": 1}'))) == 1
