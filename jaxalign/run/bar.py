"""The progress of a run's steps: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class PlainBar:
    """The tqdm methods that `Reporter` calls, without a terminal: prints only lines."""

    def __init__(self, title: str, *, silent: bool):
        self.desc, self.disable = title, silent

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Does nothing: the lines have this text."""

    def update(self) -> None:
        """Nothing."""

    def write(self, text: str) -> None:
        """A line, at once."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing."""


def default_bar(title: str, total: int, done: int, *, silent: bool) -> Any:
    """A progress bar on a terminal; otherwise a `PlainBar`."""
    if silent or not sys.stderr.isatty():
        return PlainBar(title, silent=silent)
    return tqdm(total=total, initial=done, desc=title, dynamic_ncols=True)
