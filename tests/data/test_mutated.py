"""A thousand damaged files: rows, or an error that names file, line and remedy; nothing else."""

import csv
import gzip
import io
import json
import re

import numpy as np
import pytest
from formrows import ROWS

from jaxalign.data import Faults, RowError, read_examples

_GARBAGE = [
    None, True, -1, 1e999, float("nan"), 10**400, "", " \n", "\ud83d", "x" * 200_000, [], {}, [[]],
    [None], {"role": "user"}, [{"role": "gpt", "content": 1}], [{"from": "human"}], "[{", "\x00",
    [{"type": "image_url", "image_url": {"url": "x"}}], {"a": {"b": {"c": []}}},
]  # fmt: skip


def _spots(value, path=()):
    """Every place in a nested value."""
    found = [path] if path else []
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    for key, inner in ((key, value[key]) for key in keys):
        found += _spots(inner, (*path, key))
    return found


def _damage_value(row, rng):
    """A row with something wrong somewhere: another value, a key or turn lost, doubled, swapped."""
    row = json.loads(json.dumps(row))
    spots = _spots(row)
    spot = spots[rng.integers(len(spots))]
    holder = row
    for key in spot[:-1]:
        holder = holder[key]
    kind = rng.integers(5)
    if kind == 0:
        del holder[spot[-1]]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(0, holder[spot[-1]])
    elif kind == 2 and isinstance(holder, list):
        holder.reverse()
    elif kind == 3 and isinstance(holder, dict):
        holder[f"{spot[-1]}_"] = holder.pop(spot[-1])
    else:
        holder[spot[-1]] = _GARBAGE[rng.integers(len(_GARBAGE))]
    return row


def _damage_bytes(raw, rng):
    """A file cut off, with bytes lost, doubled, or replaced by ones that are no UTF-8."""
    at, kind = int(rng.integers(len(raw))), rng.integers(5)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + b"\xff\xfe" + raw[at:]
    if kind == 2:
        return raw[:at] + raw[at + int(rng.integers(1, 20)) :]
    if kind == 3:
        return raw[:at] + raw[at // 2 : at] + raw[at:]
    return raw[:at] + bytes([rng.integers(256)]) + raw[at + 1 :]


def _key_twice(row, rng):
    """The JSON of a row with one key given twice."""
    key = list(row)[rng.integers(len(row))]
    return json.dumps(row)[:-1] + f", {json.dumps(key)}: {json.dumps(row[key])}}}"


def _as_csv(rows):
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _write(folder, number, rows, rng):
    """One damaged file: damage to a value, to the text, or to the bytes, in one of five types."""
    kind = ["jsonl", "json", "jsonl.gz", "csv", "parquet"][rng.integers(5)]
    bad = int(rng.integers(len(rows)))
    damaged = [_damage_value(r, rng) if n == bad else r for n, r in enumerate(rows)]
    in_bytes = rng.integers(2) == 1
    lines = [json.dumps(r) for r in (rows if in_bytes else damaged)]
    if not in_bytes and rng.integers(4) == 0:
        lines[bad] = _key_twice(rows[bad], rng)
    if kind == "json":
        raw = ("[\n" + ",\n".join(lines) + "\n]").encode()
    elif kind == "csv":
        raw = _as_csv(rows if in_bytes else damaged)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        out = io.BytesIO()
        try:
            table = pyarrow.Table.from_pylist(damaged if not in_bytes else rows)
            pyarrow.parquet.write_table(table, out)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            return _write(folder, number, rows, rng)  # such a table cannot be written
        raw = out.getvalue()
    else:
        raw = ("\n".join(lines) + "\n").encode()
    if in_bytes:
        raw = _damage_bytes(raw, rng)
    if kind.endswith("gz"):
        raw = gzip.compress(raw, 1, mtime=0)
        if rng.integers(4) == 0:
            raw = _damage_bytes(raw, rng)
    file = folder / f"m{number}.{kind}"
    file.write_bytes(raw)
    return file


def test_a_thousand_damaged_files(tmp_path):
    rng = np.random.default_rng(0)
    forms = list(ROWS.values())
    outcomes = {"rows": 0, "row": 0, "file": 0, "dropped": 0}
    for number in range(1000):
        reader, rows = forms[rng.integers(len(forms))]
        rows = [*rows, *rows]
        file = _write(tmp_path, number, rows, rng)
        try:
            stopped = None
            list(read_examples(file, reader))
            outcomes["rows"] += 1
        except ValueError as error:
            stopped = str(error)
        if stopped is not None:
            assert stopped.startswith(str(file)), stopped
            assert ";" in stopped, stopped  # a remedy
            if file.suffix != ".parquet" and "file is empty" not in stopped:
                assert re.match(rf"{re.escape(str(file))}(:\d+|.*after line \d+)", stopped), stopped
            assert len(stopped) < 900
        # Dropping gives the same verdict on files, and accounts for every row.
        faults = Faults("drop")
        try:
            kept = list(read_examples(file, reader, faults=faults))
        except RowError:
            raise AssertionError("a row's fault was not dropped") from None
        except ValueError:
            assert stopped is not None
            outcomes["file"] += 1
        else:
            assert faults.read == len(kept) + sum(faults.dropped.values())
            assert len(kept) == faults.kept
            assert (stopped is not None) == bool(faults.dropped)
            outcomes["row"] += stopped is not None
            outcomes["dropped"] += sum(faults.dropped.values())
        file.unlink()
    # The damage is of every sort: harmless, to a row, to a whole file.
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_a_sound_file_is_read(tmp_path, name):
    reader, rows = ROWS[name]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    faults = Faults("drop")
    assert len(list(read_examples(file, reader, faults=faults))) == len(rows) == faults.read
    assert faults.describe() == ""
