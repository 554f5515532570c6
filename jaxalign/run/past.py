"""Reads what a run's folder records of a step: its options, inputs, environment and metrics."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxalign.data.bounds import read_json_file
from jaxalign.run.changes import CONTENTS, LAYOUT, STEPS, Change, input_changes, is_free
from jaxalign.run.config.base import Run
from jaxalign.run.config.runs import algorithm_of, load_config
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.inputs import file_inputs
from jaxalign.run.lock import owner_of
from jaxalign.run.metrics import parse_row
from jaxalign.run.record import CONFIG, RECORD, VERSIONS, environment, read_record
from jaxalign.run.remote import fetch_run

METRICS = "metrics.jsonl"
_DIGEST_SIZE = 64  # length of SHA-256 in hexadecimal
_UNTIL = re.compile(r"config\.until-step-(\d+)\.yaml")
_NO_RUN = (
    "wanted the folder of a run (run.folder), with its run.json or config.yaml, metrics.jsonl and "
    "checkpoints/; an exported model alone says nothing of the steps that made it"
)


class Past(NamedTuple):
    """A run as it was at one of its steps.

    Attributes:
      folder: the run's folder.
      config: the options in effect at the step.
      values: the same as nested values.
      inputs: digests of its inputs, as in `run.inputs`; {} if not recorded.
      environment: versions and devices; {} if not recorded.
      starts: the run's starts, from `run.json`.
      metrics: step → its line of `metrics.jsonl`, without held-out metrics.
      owner: which process has the folder, or None.
    """

    folder: pathlib.Path
    config: Run
    values: Mapping[str, Any]
    inputs: dict[str, str]
    environment: dict[str, str]
    starts: list[dict[str, Any]]
    metrics: dict[int, dict[str, Any]]
    owner: str | None

    @property
    def steps(self) -> range:
        """The recorded steps, in order."""
        return range(min(self.metrics), max(self.metrics) + 1)

    def environment_changes(self) -> list[str]:
        """Changes in the environment since then, which make bitwise equality uncertain."""
        if not self.environment:
            return [f"{VERSIONS} is missing: nobody can tell the versions and devices of the run"]
        now = {"processes": "1"} | environment()
        then = {"processes": "1"} | self.environment
        names = [name for name in dict.fromkeys((*then, *now)) if name in then and name in now]
        return [str(Change(n, then[n], now[n])) for n in names if then[n] != now[n]]

    def file_changes(self) -> list[Change]:
        """Files and models whose contents have changed."""
        return input_changes(file_inputs(self.config), self.inputs)

    def text_changes(self, inputs: Mapping[str, str]) -> list[Change]:
        """Changes of tokenizer, template and date.

        Args:
          inputs: the inputs that are known once these are read, see `Task.inputs`.
        """
        return input_changes(inputs, self.inputs)

    def changes_between(self, first: int, step: int) -> tuple[list[str], list[str]]:
        """Options that changed after step `first` and before `step`.

        Returns:
          (changes that affect training, changes that may affect the last bits).
        """
        names: list[str] = []
        for start in self.starts:
            if first < start["step"] < step:
                names += start.get("changes", {})
        bits = [n for n in names if n in self.environment or _starts_with(n, LAYOUT)]
        free = {STEPS, *self.environment}
        learned = [n for n in names if n not in free and not is_free(n)]
        return learned, bits


def read_past(folder: str | pathlib.Path, step: int | None = None) -> Past:
    """Reads a run folder's record of a step; it changes nothing there.

    Args:
      folder: the run's folder.
      step: the step, from 1; None: the last one.

    Raises:
      ValueError: no run there, no metrics yet, or no such step.
    """
    place = fetch_run(os.fspath(folder), "folder")
    record = read_record(place) if place.is_dir() else None
    if record is None:
        inner = sorted(path.parent.name for path in place.glob(f"*/{RECORD}"))
        hint = f"; it holds the runs {', '.join(inner)}: give one of these" if inner else ""
        raise ValueError(f"{place}: neither {RECORD} nor {CONFIG}{hint}; {_NO_RUN}")
    metrics = read_steps(place / METRICS)
    last = max(metrics)
    if step is not None and step not in metrics:
        raise ValueError(
            f"step={step}: {place / METRICS} has the steps {min(metrics)} to {last}"
            + ("" if len(metrics) == last - min(metrics) + 1 else f", {len(metrics)} of them")
            + "; wanted one of them"
        )
    at = last if step is None else step
    starts = record.get("starts", [])
    values = _values_at(place, record["config"], at)
    config = load_config(algorithm_of(values, f"give a folder whose {CONFIG} a run wrote"), values)
    facts, inputs = _read_facts(place / VERSIONS), dict(record.get("inputs", {}))
    for start in reversed(starts):
        if start["step"] < at:
            break
        for name, (old, _) in start.get("changes", {}).items():
            _undo(name, old, facts, inputs)
    return Past(place, config, values, inputs, facts, starts, metrics, owner_of(place))


def read_steps(path: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Step → its metrics, without held-out metrics; damaged lines are skipped and counted.

    Raises:
      ValueError: there is no such file, or no step in it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {_NO_RUN}")
    found, damaged = {}, 0
    for line in path.read_bytes().split(b"\n")[:-1]:  # a partial last line is still being written
        row = parse_row(line)
        damaged += row is None and bool(line)
        if row is not None and not all(name == "step" or "eval/" in name for name in row):
            found[row.pop("step")] = row
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out")
    if not found:
        raise ValueError(f"{path}: no step is recorded yet; wait for the run's first one")
    return found


def without(config: Run, **values: Any) -> Run:
    """A configuration with some options of `run` replaced."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **values))


def _values_at(folder: pathlib.Path, last: Mapping[str, Any], step: int) -> Mapping[str, Any]:
    """The options at a step: those of the start that ran it."""
    ends = sorted(int(m[1]) for p in folder.iterdir() if (m := _UNTIL.fullmatch(p.name)))
    end = next((end for end in ends if end >= step), None)
    return last if end is None else read_yaml(folder / f"config.until-step-{end}.yaml")


def _read_facts(path: pathlib.Path) -> dict[str, str]:
    try:
        facts = read_json_file(path)
        return {str(name): str(value) for name, value in facts.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _undo(name: str, old: Any, facts: dict[str, str], inputs: dict[str, str]) -> None:
    """Undoes the changes of a later start."""
    option = name.removesuffix(CONTENTS)
    if name in facts:
        facts[name] = old
    elif option in inputs and (option != name or len(inputs[option]) < _DIGEST_SIZE):
        inputs[option] = old  # other contents, or the date that a template writes
    else:
        inputs.pop(option, None)  # another path: the old file's contents are unknown


def _starts_with(name: str, options: Iterable[str]) -> bool:
    return any(name == option or name.startswith(f"{option}.") for option in options)
