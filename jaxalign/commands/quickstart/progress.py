"""A live status line for a job of several parts: current part, progress, time left."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO


class Progress:
    """The line, rewritten in place on a terminal; otherwise one line per part.

    The time left is estimated from the parts done so far.

    Args:
      parts: the parts in their order, with the seconds that each took on some other machine.
      file: where it goes.
      clock: seconds; the time by default.
    """

    def __init__(
        self,
        parts: Mapping[str, float],
        file: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._parts, self._file = dict(parts), sys.stderr if file is None else file
        self._clock, self._began = clock, clock()
        self._done: list[str] = []
        self._now, self._share, self._note, self._shown = "", 0.0, "", False

    def begin(self, part: str) -> None:
        """The next part begins; the one before is done."""
        self._finish()
        self._now, self._share, self._note = part, 0.0, ""
        self._show(always=True)

    def step(self, share: float, note: str = "") -> None:
        """Sets the fraction of the part that is done, 0 to 1."""
        self._share, self._note = share, note
        self._show()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self._file, flush=True)

    def end(self) -> None:
        """All is done."""
        self._finish()
        self._clear()

    def seconds_left(self) -> float:
        """The time left; the other machine's until the first part has made progress."""
        spent = sum(self._parts[part] for part in self._done)
        spent += self._share * self._parts.get(self._now, 0.0)
        rest = sum(self._parts.values()) - spent
        return rest * ((self._clock() - self._began) / spent if spent else 1.0)

    def make_bar(self, title: str, total: int, done: int) -> StepBar:
        """A progress bar for `jaxalign.run.loop.train`: the steps of the current part."""
        return StepBar(self, title, total, done)

    def _finish(self) -> None:
        if self._now:
            self._done.append(self._now)
            self._now = ""

    def _line(self) -> str:
        left = max(1, round(self.seconds_left()))
        time_left = f"{left // 60} min {left % 60:02d} s" if left >= 60 else f"{left} s"
        place = f"[{len(self._done) + 1}/{len(self._parts)}] {self._now}"
        parts = [place, f"{100 * self._share:.0f} %", self._note, f"about {time_left} left"]
        return " · ".join(part for part in parts if part)

    def _show(self, always: bool = False) -> None:
        if self._file.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{self._line()[:width]:<{width}}", end="", file=self._file, flush=True)
            self._shown = True
        elif always:
            print(self._line(), file=self._file, flush=True)

    def _clear(self) -> None:
        if self._shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{'':<{width}}\r", end="", file=self._file, flush=True)
            self._shown = False


class StepBar:
    """The tqdm methods that `Reporter` calls, for the live line."""

    disable = False

    def __init__(self, progress: Progress, title: str, total: int, done: int):
        self.desc, self._progress, self._total, self._step = title, progress, total, done
        self._note = ""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Sets the text beside the step."""
        self._note = text

    def update(self) -> None:
        """A step is done."""
        self._step += 1
        self._progress.step(self._step / self._total, self._note)

    def write(self, text: str) -> None:
        """A line that stays."""
        self._progress.say(text)

    def close(self) -> None:
        """Does nothing: the line belongs to the whole job."""
