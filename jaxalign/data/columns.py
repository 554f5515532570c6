"""Which form a row has: by its columns, by a map of columns, or by a name.

A form is recognised by the first entry of a table whose columns the row has (null counts as
absent). `columns` says what a data set calls ours, `form` settles what two forms would claim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxalign.data.examples import Messages, RowError, Tools
from jaxalign.data.fields import Cell, fail, fail_with, keys, short, text
from jaxalign.data.files import Row
from jaxalign.data.messages import read_tools

Columns = Mapping[str, str] | None
Example = TypeVar("Example")

KNOWN = (
    "messages", "conversations", "prompt", "completion", "response", "instruction", "input",
    "output", "system", "history", "question", "answer", "text", "chosen", "rejected", "margin",
    "label", "tools", "answers", "completions", "scores", "ranks", "steps", "labels", "instances",
)  # fmt: skip
"""Our names of columns, which `columns` may map."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Form(NamedTuple):
    """A form of rows.

    Attributes:
      name: what `form` calls it.
      needs: the columns it is recognised by.
      read: row → example.
      by_name: it is never recognised, only named: its columns may mean something else.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Any]
    by_name: bool = False


def read_form(
    row: Row, forms: tuple[Form, ...], columns: Columns, form: str | None, hint: str = ""
) -> Any:
    """Reads a row by the form that its columns, or `form`, name.

    Args:
      row: as it was read.
      forms: the forms to choose from; the first that fits is taken.
      columns: our column → theirs.
      form: the name of the form, where several would fit.
      hint: what to add to the error where none fits.

    Raises:
      ValueError: an unknown form or column, a row of no form, or what the form's reader finds.
    """
    row = renamed(row, columns)
    if form is not None:
        found = [each for each in forms if each.name == form]
        if not found:
            names = dict.fromkeys(each.name for each in forms)
            raise ValueError(f"form: got {form!r}, wanted one of {', '.join(names)}")
        for each in found:
            if all(column in row.data for column in each.needs):
                return each.read(row)
        wanted = " or ".join(" + ".join(each.needs) for each in found)
        raise _unknown(row, f"{wanted} (form {form!r})")
    there = {column for column, value in row.data.items() if value is not None}
    seen = [each for each in forms if not each.by_name]
    for present in (there, set(row.data)):
        for each in seen:
            if present.issuperset(each.needs):
                return each.read(row)
    wanted = ", or ".join(dict.fromkeys(" + ".join(each.needs) for each in seen))
    raise _unknown(row, wanted + hint)


def _unknown(row: Row, wanted: str) -> RowError:
    message = (
        f"got the columns {keys(row.data)}, wanted {wanted}; correct the row, or say what the "
        "columns are called by `columns: {ours: theirs}`"
    )
    return RowError(row.origin, "columns of no known form", message)


def renamed(row: Row, columns: Columns) -> Row:
    """The row with our names of columns, checked to be one that can be trained as text."""
    data = row.data
    if columns:
        strange = [name for name in columns if name not in KNOWN]
        if strange:
            raise ValueError(
                f"columns: got {', '.join(map(repr, strange))}, wanted our names on the left side: "
                f"{', '.join(KNOWN)}"
            )
        data = {key: value for key, value in data.items() if key not in columns.values()}
        for ours, theirs in columns.items():
            if ours == "margin" and " - " in theirs:
                data[ours] = tuple(_column(row, name.strip()) for name in theirs.split(" - ", 1))
            elif ours == "scores" and ("," in theirs or theirs not in row.data):
                names = [name.strip() for name in theirs.split(",")]
                data[ours] = {name: _column(row, name) for name in names}
            else:
                data[ours] = _column(row, theirs)
    for key in _MEDIA:
        if data.get(key) not in (None, "", []):
            fail(
                row.origin,
                key,
                short(data[key]),
                "a row of text",
                "images, sound and video are not supported: remove such rows, or the column",
            )
    return Row(data, row.origin)


def _column(row: Row, name: str) -> Any:
    if name not in row.data:
        message = (
            f"columns: got no column {name!r}, wanted one of {keys(row.data)}; correct the map"
        )
        raise RowError(row.origin, f"{name}: missing", message)
    return row.data[name]


def tools_of(row: Row) -> Tools:
    """The column `tools`."""
    return read_tools(row.data.get("tools"), "tools", row.origin)


def with_system(row: Row, messages: Messages) -> Messages:
    """The messages after the column `system`, where the row has one."""
    if row.data.get("system") in (None, ""):
        return messages
    if messages[0]["role"] == "system":
        fail_with(row.origin, "system", "the messages have a system turn already", "keep one")
    return (
        {"role": "system", "content": text(row.data["system"], "system", row.origin)},
        *messages,
    )


def is_listed(value: Any) -> bool:
    """Whether a field holds a list, also as the JSON text of a table's cell."""
    return isinstance(value, list | tuple) or (
        isinstance(value, Cell) and value.lstrip().startswith("[")
    )
