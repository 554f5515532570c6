"""Recognises a row's form: by its columns, by a map of columns, or by name.

A row has the first form in a table whose columns it has (null counts as absent). `columns` maps our
names to the data set's; `form` decides if two forms would fit. The columns that a reader uses are
recorded, so a column with a known meaning is never silently ignored: either it is read, or an error
says how to map it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxalign.data.examples import Messages, RowError, Tools
from jaxalign.data.fields import Cell, fail, fail_with, keys, parsed, short, text
from jaxalign.data.files import Row
from jaxalign.data.meaning import ANSWERS, IGNORE, PROMPTS, check_unused, check_weight
from jaxalign.data.messages import is_messages, read_tools
from jaxalign.data.names import FIELDS, SPEAKERS, meaning_of, plain

Columns = Mapping[str, str] | None
Example = TypeVar("Example")

KNOWN = (
    *("messages", "conversations", "prompt", "completion", "response", "instruction", "input"),
    *("output", "system", "context", "history", "question", "answer", "text", "chosen"),
    *("rejected", "margin", "label", "tools", "answers", "completions", "scores", "ranks"),
    *("steps", "labels", "instances", "thinking", "weight", "chat_template_kwargs"),
)
"""Our column names, which `columns` can map."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Columns of messages and tools: tables fill keys that only other rows have with nulls.
_NESTED = (
    *("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools"),
    *("chosen_messages", "rejected_messages"),
)


@dataclasses.dataclass
class Reading:
    """Records what was read from one row.

    Attributes:
      form: the name of its form.
      columns: our name → the data set's name, for the columns that were read.
      unused: columns of the data set that were not read.
      nulls: null-filled keys of messages and tools that were left out.
    """

    form: str = ""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    nulls: int = 0


class Recorded(dict[str, Any]):
    """The columns of a row, under our names; `read` collects the columns that were looked up."""

    def __init__(self, data: Mapping[str, Any], source: Mapping[str, Any], reading: Reading):
        super().__init__(data)
        self.source = source  # the row as read
        self.theirs = {name: name for name in data}
        self.ignored: set[str] = set()
        self.reading = reading

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self._record(name)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The value under one of our names; records the column as read."""
        if name in self:
            self._record(name)
        return super().get(name, default)

    def _record(self, name: str) -> None:
        if self.has(name):
            self.reading.columns[name] = self.theirs.get(name, name)

    def has(self, name: str) -> bool:
        """Whether there is a value, without recording the column as read."""
        return dict.get(self, name) not in (None, "", [])

    def changed(self, changes: Mapping[str, Any]) -> Recorded:
        """A copy with other values in some columns; reads are recorded in the same place."""
        copy = Recorded({**self, **changes}, self.source, self.reading)
        copy.theirs |= self.theirs
        copy.ignored = self.ignored
        return copy

    def rename(self, theirs: str, ours: str) -> None:
        """Gives a column our name."""
        self[ours] = self.pop(theirs)
        self.theirs[ours] = self.theirs.pop(theirs)


class Form(NamedTuple):
    """A form of rows.

    Attributes:
      name: the form's name in the option `form`.
      needs: the columns that the row must have; "a|b" means one of the two.
      read: row → example.
      by_name: the form is only used when named, because its columns could mean something else.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Any]
    by_name: bool = False

    def fits(self, columns: Collection[str]) -> bool:
        """Whether the row has all the columns that the form needs."""
        return all(any(c in columns for c in need.split("|")) for need in self.needs)


def read_form(
    row: Row,
    forms: tuple[Form, ...],
    columns: Columns,
    form: str | None,
    hint: str = "",
    *,
    trained: bool = False,
) -> Any:
    """Reads a row in the form that its columns, or the option `form`, determine.

    Args:
      row: the row as read.
      forms: the forms to choose from; the first that fits is taken.
      columns: our column → the data set's.
      form: the name of the form, if several would fit.
      hint: added to the error if no form fits.
      trained: the row's one answer is trained (SFT). An unread second column with an answer or
        reasoning is then an error.

    Raises:
      ValueError: an unknown form or column, a row of no form, a column with a known meaning that is
        not read, or an error of the form's reader.
    """
    row = renamed(row, columns)
    data: Any = row.data
    check_weight(row, trained)
    chosen = _form_of(row, forms, form, hint)
    data.reading.form = data.reading.form or chosen.name
    try:
        example = chosen.read(row)
    except RowError as error:
        raise _in_their_words(error, data) from None
    read = set(data.reading.columns.values())
    unused = [name for name in data.source if name not in read and name not in data.ignored]
    data.reading.unused = tuple(
        name for name in unused if data.source[name] not in (None, "", [], {})
    )
    for name in data.reading.unused:
        check_unused(row, name, example, trained=trained, by_columns=form is None)
    return example


def _in_their_words(error: RowError, data: Recorded) -> RowError:
    """Adds the data set's column name to an error that uses our name."""
    ours = re.match(r"\w+", error.reason)
    theirs = data.theirs.get(ours[0], ours[0]) if ours else None
    if ours is None or theirs == ours[0]:
        return error
    message = str(error).removeprefix(f"{error.origin}: ")
    found = RowError(error.origin, error.reason, f"{message} ({ours[0]} is the column {theirs!r})")
    return found


def _form_of(row: Row, forms: tuple[Form, ...], form: str | None, hint: str) -> Form:
    data: Any = row.data
    if form is not None:
        named = [candidate for candidate in forms if candidate.name == form]
        if not named:
            names = dict.fromkeys(candidate.name for candidate in forms)
            raise ValueError(f"form: got {form!r}, wanted one of {', '.join(names)}")
        for candidate in named:
            if candidate.fits(data):
                return candidate
        wanted = " or ".join(dict.fromkeys(" + ".join(candidate.needs) for candidate in named))
        raise _unknown(row, f"{wanted} (form {form!r})")
    filled = {column for column, value in data.items() if value is not None}
    seen = [candidate for candidate in forms if not candidate.by_name]
    present: Collection[str]
    for present in (filled, data):
        for candidate in seen:
            if candidate.fits(present):
                return candidate
    wanted = ", or ".join(dict.fromkeys(" + ".join(candidate.needs) for candidate in seen))
    raise _unknown(row, wanted + hint)


def _unknown(row: Row, wanted: str) -> RowError:
    source = getattr(row.data, "source", row.data)
    message = (
        f"got the columns {keys(source)}, wanted {wanted}; correct the row, or say what the "
        "columns are called by `columns: {ours: theirs}` of the source (in a configuration: "
        "data.train: [{path: …, columns: {…}}])"
    )
    return RowError(row.origin, "columns of no known form", message)


# Columns under our names


def renamed(row: Row, columns: Columns) -> Row:
    """The row under our column names, checked to contain only text."""
    if isinstance(row.data, Recorded) and row.data.reading.form:
        return row  # a form that delegates to another form
    given = row.data.reading if isinstance(row.data, Recorded) else Reading()
    data = Recorded(row.data, dict(row.data), given)
    row = Row(data, row.origin)
    fields: dict[str, str] = {}
    if columns:
        fields = _apply(row, columns)
    _adopt(data)
    for name in _NESTED:
        if isinstance(dict.get(data, name), list | tuple | dict):
            value = _without_nulls(dict.__getitem__(data, name), data.reading)
            dict.__setitem__(data, name, _mapped(value, fields) if fields else value)
    for key in _MEDIA:
        if dict.get(data, key) not in (None, "", []):
            fail(
                row.origin,
                key,
                short(data[key]),
                "a row of text",
                "images, sound and video are not supported: remove such rows, or the column",
            )
    return row


def _apply(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """Renames columns by `columns`; returns its entries for message fields and speakers."""
    data: Any = row.data
    source = data.source
    fields = {ours: theirs for ours, theirs in columns.items() if "." in ours}
    ignored = {
        name for name, theirs in columns.items() if theirs == IGNORE and IGNORE not in source
    }
    ours_theirs = {
        ours: theirs
        for ours, theirs in columns.items()
        if ours not in fields and ours not in ignored
    }
    strange = [name for name in ours_theirs if name not in KNOWN] + [
        name for name in fields if not _is_field(name)
    ]
    if strange:
        raise ValueError(
            f"columns: got {', '.join(map(repr, strange))}, wanted our names on the left side: "
            f"{', '.join(KNOWN)}, message.role, message.content, role.user, role.assistant, …; or "
            f"the name of a column with {IGNORE!r} on the right"
        )
    for name in ignored:
        data.pop(name, None)
        data.ignored.add(name)
    for theirs in ours_theirs.values():
        data.pop(theirs, None)
    for ours, theirs in ours_theirs.items():
        if ours == "margin" and " - " in theirs:
            names = [name.strip() for name in theirs.split(" - ", 1)]
            data[ours] = tuple(_column(row, name) for name in names)
            data.ignored.update(names)
        elif ours == "scores" and ("," in theirs or theirs not in source):
            names = [name.strip() for name in theirs.split(",")]
            data[ours] = {name: _column(row, name) for name in names}
            data.ignored.update(names)
        else:
            data[ours] = _column(row, theirs)
        data.theirs[ours] = theirs
    return fields


def _is_field(name: str) -> bool:
    """Whether a name is `message.FIELD` or `role.ROLE`."""
    kind, _, field = name.partition(".")
    return field in (FIELDS if kind == "message" else SPEAKERS if kind == "role" else ())


def _column(row: Row, name: str) -> Any:
    source = getattr(row.data, "source", row.data)
    if name not in source:
        message = f"columns: got no column {name!r}, wanted one of {keys(source)}; correct the map"
        raise RowError(row.origin, f"{name}: missing", message)
    return source[name]


def _adopt(data: Recorded) -> None:
    """Gives columns with other common names our names, if the row has no column of that kind."""
    for name in [name for name in data if isinstance(name, str) and name not in KNOWN]:
        if plain(name) in KNOWN and plain(name) not in data:
            data.rename(name, plain(name))
    pairs = data.has("chosen") and data.has("rejected")
    whole = pairs and any(is_messages(dict.get(data, side)) for side in ("chosen", "rejected"))
    _adopt_first(data, "messages", ("messages", "conversations", "prompt"), is_messages)
    _adopt_first(data, "system", ("system",))
    _adopt_first(data, "tools", ("tools",), lambda value: True)
    _adopt_first(data, "thinking", ("thinking",))
    answered = (*ANSWERS, *("messages", "conversations", "instances", "chosen", "rejected"))
    answered += ("chosen_messages", "text", "answers", "completions", "steps")
    if not any(data.has(name) or name in data for name in answered):
        _adopt_first(data, "completion", ANSWERS)
    conversation = data.has("chosen_messages") or whole
    if not conversation and not any(name in data for name in PROMPTS):
        _adopt_first(data, "prompt", PROMPTS)
        if "prompt" not in data and (pairs or any(name in data for name in answered)):
            # A context without a prompt is itself the prompt.
            _adopt_first(data, "context", ("context",))
            for name in ("input", "context"):
                if "prompt" not in data and data.has(name) and "instances" not in data:
                    data.rename(name, "prompt")
    if any(data.has(name) for name in PROMPTS):
        _adopt_first(data, "context", ("context", "input"))


def _adopt_first(
    data: Recorded,
    meaning: str,
    present: Collection[str],
    fits: Callable[[Any], bool] = lambda value: isinstance(value, str) or is_messages(value),
) -> None:
    """Renames the first column with a given meaning, unless one of `present` exists."""
    if any(data.has(name) for name in present):
        return
    for name in list(data):
        if meaning_of(name) == meaning and name not in KNOWN and data.has(name):
            if fits(dict.__getitem__(data, name)):
                data.pop(meaning, None)
                data.rename(name, meaning)
            return


def _without_nulls(value: Any, reading: Reading) -> Any:
    """Lists and objects without keys whose value is null."""
    if isinstance(value, Mapping):
        kept = {key: inner for key, inner in value.items() if inner is not None}
        reading.nulls += len(value) - len(kept)
        return {key: _without_nulls(inner, reading) for key, inner in kept.items()}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner, reading) for inner in value]
    return value


def _mapped(value: Any, fields: Mapping[str, str]) -> Any:
    """Messages with our names of fields and roles, mapped by `message.FIELD` and `role.ROLE`."""
    if isinstance(value, list):
        return [_mapped(message, fields) for message in value]
    if not isinstance(value, dict):
        return value
    message = dict(value)
    for ours, theirs in fields.items():
        kind, _, name = ours.partition(".")
        if kind == "message" and theirs in message:
            message = {name: message.pop(theirs)} | message
    speaker = next((key for key in FIELDS["role"] if key in message), None)
    for ours, theirs in fields.items():
        kind, _, role = ours.partition(".")
        if kind == "role" and speaker is not None:
            names = [name.strip() for name in theirs.split(",")]
            message[speaker] = role if message[speaker] in names else message[speaker]
    return message


# Columns beside the messages


def tools_of(row: Row) -> Tools:
    """The column `tools`."""
    return read_tools(row.data.get("tools"), "tools", row.origin)


def template_kwargs_of(row: Row) -> dict[str, Any] | None:
    """The column `chat_template_kwargs`: variables of the template for this row."""
    value = row.data.get("chat_template_kwargs")
    if isinstance(value, str):
        found = parsed(value)
        absent = value.strip() in ("", "null")
        value = None if absent else value if found is None else found
    if value in (None, {}):
        return None
    if not isinstance(value, dict):
        fail(row.origin, "chat_template_kwargs", short(value), "an object of variable: value")
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        fail(row.origin, "chat_template_kwargs", short(value), "values that JSON can hold")
    return {str(name): inner for name, inner in value.items() if inner is not None}


def with_system(row: Row, messages: Messages) -> Messages:
    """The messages, preceded by the column `system` if the row has one."""
    if row.data.get("system") in (None, ""):
        return messages
    system = text(row.data["system"], "system", row.origin)
    if messages[0]["role"] == "system":
        if messages[0]["content"].strip() == system.strip():
            return messages
        fail_with(row.origin, "system", "the messages have a system turn already", "keep one")
    return ({"role": "system", "content": system}, *messages)


def is_listed(value: Any) -> bool:
    """Whether a field holds a list, or a table cell with a list as JSON text."""
    return isinstance(value, list | tuple) or (
        isinstance(value, Cell) and value.lstrip().startswith("[")
    )
