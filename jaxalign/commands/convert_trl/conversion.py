"""The state of a conversion: remaining TRL arguments, our values, and what was left out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign.commands.convert_trl.defaults import CARRIED, is_off
from jaxalign.commands.convert_trl.table import Row, arguments


class Note(NamedTuple):
    """A difference between the converted file and TRL's.

    Attributes:
      what: an argument with its value, or one of our options.
      why: the reason, and what to do.
    """

    what: str
    why: str


class Conversion:
    """Takes TRL's arguments one by one and fills a configuration of ours.

    Args:
      trainer: a key of `table.SECTIONS`.
      given: the arguments of the file.
      processes: the number of devices of TRL's run.

    Attributes:
      trainer: as given.
      processes: as given.
      values: our configuration so far, nested.
      notes: what was left out, with reasons.
    """

    def __init__(self, trainer: str, given: Mapping[str, Any], processes: int):
        self.trainer = trainer
        self.processes = processes
        self.values: dict[str, Any] = {}
        self.notes: list[Note] = []
        # `TrainingArguments.to_dict` writes "<HUB_TOKEN>" instead of a token, even if none was
        # given.
        hidden = {name for name, value in given.items() if value == f"<{name.upper()}>"}
        self._given = {name: value for name, value in given.items() if name not in hidden}
        self._left = {name: value for name, value in self._given.items() if value is not None}
        self._rows = arguments(trainer)

    def given(self, name: str) -> bool:
        """Whether the file sets an argument to something other than null."""
        return self._given.get(name) is not None

    def take(self, name: str, otherwise: Any = None) -> Any:
        """An argument's value, or TRL's default, or `otherwise`; marks it as converted."""
        value = self._left.pop(name, None)
        if value is None and not self.given(name):
            value = CARRIED[self.trainer].get(name)
        return otherwise if value is None else value

    def look(self, name: str) -> Any:
        """An argument's value or TRL's default, for a rule that does not itself convert it."""
        return self._given[name] if self.given(name) else CARRIED[self.trainer].get(name)

    def number(self, name: str, otherwise: Any = None) -> Any:
        """Like `take`, as a number; YAML and JSON may hold `1e-5` as text.

        Raises:
          ValueError: it is none.
        """
        value = self.take(name, otherwise)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{name}={value!r}: wanted a number") from None
            return int(value) if value.is_integer() and abs(value) >= 1 else value
        return value

    def put(self, option: str, value: Any) -> None:
        """Sets `section.option`."""
        *parents, leaf = option.split(".")
        node = self.values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value

    def note(self, what: str, why: str) -> None:
        """Records something that could not be converted."""
        self.notes.append(Note(what, why))

    def leave(self, name: str, why: str | None = None) -> None:
        """Drops an argument; adds a note unless it has no effect."""
        value = self._left.pop(name, None)
        if not is_off(name, value):
            row = self._rows.get(name)
            shown = "(not shown)" if name == "hub_token" else _short(value)
            self.note(f"{name}: {shown}", why or _reason(row))

    def rest(self) -> None:
        """Handles the remaining arguments: converts renamed ones, notes the others."""
        for name in list(self._left):
            row = self._rows.get(name)
            if row is None:
                near = difflib.get_close_matches(name, self._rows, 1, 0.8)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.leave(name, f"no argument of TRL's {self.trainer.upper()}{hint}")
            elif row.options():
                value = self.number(name) if _numeric(self._left[name]) else self.take(name)
                self.put(row.options()[row.names.index(name)], value)
            else:
                self.leave(name)


def _numeric(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _reason(row: Row | None) -> str:
    if row is None:
        return "there is no such option"
    if row.missing:
        return row.note or "there is no such option"
    return f"see {row.ours}" + (f": {row.note}" if row.note else "")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
