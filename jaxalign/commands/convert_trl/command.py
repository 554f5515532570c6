"""The command `convert-trl`."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from jaxalign.commands.command import Command
from jaxalign.commands.convert_trl.table import SECTIONS
from jaxalign.commands.going_on import write_new


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML or JSON of TRL's arguments")
    parser.add_argument(
        "--as", dest="trainer", choices=tuple(SECTIONS), help="the trainer; found out if it can be"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="devices that TRL ran on: its batch is that of one device times their number",
    )
    parser.add_argument("--out", metavar="FILE", help="file to write; printed if none")


def _run(parsed: argparse.Namespace) -> None:
    from jaxalign.commands.convert_trl.convert import COMMANDS, convert, find_trainer
    from jaxalign.run.config.yaml import yaml_text

    if parsed.processes < 1:
        raise ValueError(f"--processes {parsed.processes}: wanted 1 or more")
    if parsed.config.startswith("recipe:"):
        raise ValueError(f"{parsed.config}: this is ours already; wanted a file of TRL's arguments")
    given = _read(parsed.config)
    trainer = find_trainer(given) if parsed.trainer is None else parsed.trainer
    values, notes = convert(given, trainer, parsed.processes)
    file = parsed.out or "FILE"
    text = f"# From TRL's {trainer.upper()} arguments:  jaxalign {COMMANDS[trainer]} {file}\n"
    text += yaml_text(values)
    if parsed.out is None:
        print(text, end="")
    else:
        file = pathlib.Path(parsed.out).expanduser()
        write_new(file, text)
        print(f"{file}: written", file=sys.stderr)
    for note in notes:
        print(f"not carried over: {note.what}: {note.why}", file=sys.stderr)
    if not notes:
        print("everything was carried over", file=sys.stderr)


def _read(path: str) -> dict[str, Any]:
    from jaxalign.data.bounds import read_json_file
    from jaxalign.run.config.yaml import read_yaml

    if not path.endswith(".json"):
        return read_yaml(path)
    given = read_json_file(pathlib.Path(path).expanduser())
    if not isinstance(given, dict):
        raise ValueError(f"{path}: wanted an object of arguments, got a {type(given).__name__}")
    return given


COMMAND = Command(
    "convert-trl",
    "TRL's arguments, in YAML or JSON, as a configuration of ours",
    _arguments,
    _run,
)
