"""Tiny runs to disturb, one that nobody disturbed, and how a disturbed one ended."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import _runs
from _runs import Child, Ended

_LIMIT = 60.0  # seconds beyond an undisturbed run, after which a process is killed
_HANG = 5.0  # seconds beyond an undisturbed run, after which a process counts as hung
_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a fault ended.

    Attributes:
      ended: the disturbed process.
      status: the exit status expected of it.
      lost: "nothing", what differs from an uninterrupted run, or "" where nothing was at stake.
      expected: text that its output must hold.
      usual: an undisturbed run of the same kind.
    """

    ended: Ended
    status: int
    lost: str
    expected: str
    usual: Ended

    @property
    def ok(self) -> bool:
        """Whether all is as it should be."""
        right = self.ended.status == self.status and self.expected in self.ended.log
        right = right and self.waited <= _HANG and self.worked <= _HANG
        return right and self.lost in ("nothing", "") and "Traceback" not in self.ended.log

    @property
    def waited(self) -> float:
        """Seconds in which it did not work, beyond those of an undisturbed run."""
        idle = (max(0.0, ended.seconds - ended.processor) for ended in (self.ended, self.usual))
        return max(0.0, next(idle) - next(idle))

    @property
    def worked(self) -> float:
        """Seconds of processor time beyond those of an undisturbed run."""
        return max(0.0, self.ended.processor - self.usual.processor)

    def summary(self, place: pathlib.Path) -> dict[str, Any]:
        """For the file; paths are cut."""
        lines = [line for line in re.split(r"[\n\r]", self.ended.log) if line.strip()]
        said = next((line for line in lines if "error:" in line or "stopped" in line), "")
        said = (said or (lines[-1] if lines else "")).replace(str(place), "…")
        return {
            "status": self.ended.status,
            "message": said[:_SHOWN],
            "lost": self.lost,
            "traceback": "Traceback" in self.ended.log,
            "seconds": round(self.ended.seconds, 1),
            "waited_longer": round(self.waited, 1),
            "worked_longer": round(self.worked, 1),
            "peak_mib": round(self.ended.peak),
        }


class Bench:
    """Tiny runs to disturb, and one that nobody disturbed.

    Args:
      place: folder for everything.
    """

    def __init__(self, place: pathlib.Path):
        self.place, self._files, self._started = place, self.folder("files", place), 0
        self.models = _runs.make_models(place)
        self._usual: dict[str, Ended] = {}
        self.whole = self.folder("whole") / "run"
        self.usual("sft", self.whole)
        half = self.folder("half") / "run"
        child = self.start(half)
        wait_for(child, lambda: (half / "checkpoints/4").exists())
        child.kill()
        child.wait()
        self.half = half

    def folder(self, name: str, place: pathlib.Path | None = None) -> pathlib.Path:
        """A fresh folder."""
        folder = (self.place if place is None else place) / re.sub(r"\W+", "-", name)
        folder.mkdir()
        return folder

    def usual(self, kind: str, folder: pathlib.Path | None = None, **sections: Any) -> Ended:
        """A run of a kind that nobody disturbs, with its programs compiled before."""
        if kind not in self._usual:
            place = self.folder(f"usual-{kind}") / "run" if folder is None else folder
            for _ in range(2):  # the first one compiles
                shutil.rmtree(place, ignore_errors=True)
                ended = self.start(place, kind=kind, **sections).wait()
                if ended.status:
                    raise RuntimeError(ended.log)
            self._usual[kind] = ended
        return self._usual[kind]

    @property
    def limit(self) -> float:
        """Seconds after which a process is killed."""
        return 2 * max(ended.seconds for ended in self._usual.values()) + _LIMIT

    def start(
        self, folder: pathlib.Path, *overrides: str, kind: str = "sft",
        before: Callable[[], None] = lambda: None, **sections: Any,
    ) -> Child:  # fmt: skip
        """Starts a run.

        Args:
          folder: the run's.
          overrides: of options.
          kind: of run, see `_runs.settings`.
          before: called in the fork, before the command.
          sections: sections of the configuration, merged into it.
        """
        # Data and output lie elsewhere: the folder's disk may be full.
        values = _runs.settings(kind, self.models, self._files / "run")
        values["run"]["folder"] = str(folder)
        for name, section in sections.items():
            both = isinstance(section, dict) and isinstance(values.get(name), dict)
            values[name] = values[name] | section if both else section
        self._started += 1
        path = self._files / f"{self._started}.yaml"
        path.write_text(json.dumps(values))
        name = "ppo" if kind == "grpo" else kind
        command = _runs.command(name, str(path), *overrides)

        def run() -> int:
            from jaxalign.run import storage

            storage.DELAYS = tuple(delay / 20 for delay in storage.DELAYS)
            before()
            return command()

        return Child(run, path.with_suffix(".log"))

    def run(self, folder: pathlib.Path, *overrides: str, **keywords: Any) -> Ended:
        """A run from beginning to end."""
        return self.start(folder, *overrides, **keywords).wait(self.limit)

    def resume(self, folder: pathlib.Path) -> str:
        """Goes on with a run; what was lost."""
        ended = self.run(folder, "run.resume=true")
        return self.lost(folder) if ended.status == 0 else f"no resume: {ended.log[-_SHOWN:]}"

    def lost(self, folder: pathlib.Path) -> str:
        """What a finished run lacks."""
        compared = _runs.compare(folder, self.whole)
        parts = zip(compared._fields, compared, strict=True)
        return "; ".join(f"{name}: {', '.join(part)}" for name, part in parts if part) or "nothing"

    def outcome(
        self, ended: Ended, status: int, lost: str = "", expected: str = "", kind: str = "sft"
    ) -> Outcome:
        """With this bench's undisturbed run of the kind."""
        return Outcome(ended, status, lost, expected, self.usual(kind))


Fault = Callable[[Bench, pathlib.Path], Outcome]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    """Enters a fault in the table."""

    def enter(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return enter


def wait_for(child: Child, event: Callable[[], bool]) -> None:
    """Waits for an event in a run, or for its end."""
    while child.poll() is None and not event():
        time.sleep(0.002)


def at_second_checkpoint(bench: Bench, place: pathlib.Path, **keywords: Any) -> Child:
    """A run whose first checkpoint, of step 2, has just got its name."""
    child = bench.start(place / "run", **keywords)
    wait_for(child, lambda: (place / "run/checkpoints/2").exists())
    return child
