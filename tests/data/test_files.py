"""Tables, texts, streams: what else is read, lazily, with what origin."""

import gzip
import itertools
import json
import sys
import types

import pytest

from jaxalign.data import Row, RowError, iter_rows, read_rows, to_preference, to_unpaired


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_has_lines_and_untyped_cells(tmp_path):
    text = 'prompt,completion,label,note\n"a, ""b""\nc",5,true,\n\n你好,"[1]",0,x\n'
    plain, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    for file, raw in ((plain, text.encode()), (packed, gzip.compress(text.encode()))):
        rows = read_rows(_write(file, raw))
        assert [row.origin for row in rows] == [f"{file}:2", f"{file}:5"]
        assert rows[0].data == {"prompt": 'a, "b"\nc', "completion": "5", "label": "true"}
        first, second = (to_unpaired(row) for row in rows)
        assert (first.answer[0]["content"], first.desirable) == ("5", True)
        assert (second.answer[0]["content"], second.desirable) == ("[1]", False)


def test_csv_holds_messages_and_numbers_as_json(tmp_path):
    turns = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    cell = '"' + turns.replace('"', '""') + '"'
    file = _write(tmp_path / "a.csv", f"chosen,rejected,margin\n{cell},{cell},1.5\n")
    pair = to_preference(read_rows(file)[0])
    assert (pair.prompt[0]["content"], pair.chosen[0]["content"], pair.margin) == ("q", "a", 1.5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a,b\n1,2\n3\n", r"a\.csv:3: got 1 cells, wanted 2 as in the header; correct"),
        ("a,a\n1,2\n", r"a\.csv:1: two columns have the same name; rename"),
        ('a,b\n1,"2\n', r"a\.csv:2: malformed CSV: .*begins at line 2\); correct the quotes"),
        ("a,b\n", r"a\.csv: the file is empty"),
        ("a,b\n,\n", r"a\.csv:2: got an empty object"),
        (b"a,b\n1,\xff\n", r"a\.csv:2: invalid UTF-8"),
    ],
)
def test_faults_of_csv(tmp_path, text, wanted):
    with pytest.raises(ValueError, match=wanted):
        read_rows(_write(tmp_path / "a.csv", text))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"问 {n}", "turns": [{"a": n}], "x": None if n else 1} for n in range(3000)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=1000)
    found = list(iter_rows(file))
    assert found[0] == Row(rows[0], f"{file}: row 1")
    assert found[2999] == Row({"prompt": "问 2999", "turns": [{"a": 2999}]}, f"{file}: row 3000")
    damaged = bytearray(file.read_bytes())
    damaged[4:400] = bytes(396)
    with pytest.raises(
        ValueError, match=r"b\.parquet: cannot be read after row 0 \(.*; check or re"
    ):
        read_rows(_write(tmp_path / "b.parquet", bytes(damaged)))


def test_text_files_are_documents(tmp_path):
    file = _write(tmp_path / "a.txt", "\none\ntwo\n<|endoftext|>\n<|endoftext|>\n三\n")
    assert read_rows(file) == [
        Row({"text": "one\ntwo"}, f"{file}:1"),
        Row({"text": "三"}, f"{file}:6"),
    ]
    whole = _write(tmp_path / "b.txt", "one\n\ntwo")
    assert [row.data["text"] for row in read_rows(whole)] == ["one\n\ntwo"]


def test_a_key_given_twice_is_a_fault(tmp_path):
    file = _write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": [{"b": 1, "b": 2}]}\n{"a": 3}\n')
    faults = []
    assert [row.data["a"] for row in read_rows(file, faults.append)] == [1, 3]
    (fault,) = faults
    assert isinstance(fault, RowError)
    assert str(fault) == f"{file}:2: the key 'b' is given twice in an object; keep one of them"
    file = _write(tmp_path / "a.json", '[{"a": 1},\n{"a": 2, "a": 2},\n{"a": 3}]')
    faults.clear()
    assert [row.data["a"] for row in read_rows(file, faults.append)] == [1, 3]
    assert [fault.origin for fault in faults] == [f"{file}:2 (row 2)"]


def test_bad_rows_are_passed_over_and_bad_files_never(tmp_path):
    file = _write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a":\n[2]\n{"a": "\xff"}\n{"a": 5}\n')
    faults = []
    assert [row.data["a"] for row in iter_rows(file, faults.append)] == [1, 5]
    assert [fault.reason for fault in faults] == [
        "malformed JSON",
        "no object with columns",
        "invalid UTF-8",
    ]
    half = gzip.compress("".join(f'{{"a": {n}}}\n' for n in range(9999)).encode())[:9000]
    for name, content in (("b.json", '[{"a": 1}, {'), ("c.jsonl.gz", half)):
        with pytest.raises(ValueError, match=name):
            list(iter_rows(_write(tmp_path / name, content), faults.append))
    assert len(faults) == 3


def test_rows_are_read_one_at_a_time(tmp_path):
    """The error of a later line is raised when that line is reached, not before."""
    for name, text in (
        ("a.jsonl", '{"a": 1}\n{"a": 2}\n{"a'),
        ("a.csv", "a,b\n1,x\n2,x\n3\n"),
    ):
        file = _write(tmp_path / name, text)
        rows = iter_rows(file)
        assert len(list(itertools.islice(rows, 2))) == 2
        with pytest.raises(ValueError, match=rf"{name}:[34]"):
            next(rows)


def test_indices_of_data_sets_hold_no_rows(tmp_path):
    _write(tmp_path / "dataset_info.json", '{"a": {"file_name": "a.json"}}')
    _write(tmp_path / "a.csv", "a\n1\n")
    assert len(read_rows(tmp_path)) == 1


def test_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return iter([{"prompt": "a", "chosen": None}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("o/n", "o/n:test", "o/n:main:test", "o/n:train[:5]", "o/n:main:train[1:5]"):
        assert [row.data for row in iter_rows(name)] == [{"prompt": "a"}]
    assert asked == [
        ("o/n", {"split": "train", "streaming": True}),
        ("o/n", {"split": "test", "streaming": True}),
        ("o/n", {"split": "test", "name": "main", "streaming": True}),
        ("o/n", {"split": "train[:5]"}),
        ("o/n", {"split": "train[1:5]", "name": "main"}),
    ]
