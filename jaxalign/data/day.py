"""The day that chat templates write.

Some templates call `strftime_now` and so write the date into every conversation. A run keeps the
day of its first start: past midnight, after a resume and in a replay, its rows have the same
tokens.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterator

_CALL = re.compile(r"""\bstrftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")

_kept: list[datetime.date] = []  # of the process: rows are also rendered in other threads


@contextlib.contextmanager
def keep_day(day: datetime.date) -> Iterator[None]:
    """Within, the renderers that are made write this day."""
    _kept.append(day)
    try:
        yield
    finally:
        _kept.pop()


def with_day(template: str) -> str:
    """A template with the kept day in place of its calls of `strftime_now`; else as it is.

    Only calls with a format in quotes are replaced: transformers passes no function to a template.
    """
    if not _kept:
        return template
    day = datetime.datetime.combine(_kept[-1], datetime.time.min)
    return _CALL.sub(lambda call: json.dumps(day.strftime(call[1][1:-1])), template)


def written_day(template: str) -> datetime.date | None:
    """The day that a template writes; None if it writes none."""
    if "strftime_now" not in template:
        return None
    replaced = _kept and "strftime_now(" not in with_day(template)
    return _kept[-1] if replaced else datetime.date.today()
