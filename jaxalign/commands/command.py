"""The definition of a subcommand of `jaxalign`; each command's file declares its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      name: the word on the command line.
      help: one line for `jaxalign --help`.
      add_arguments: adds its arguments to its parser.
      run: runs the command with the parsed arguments; returns the exit status, None for 0.
      compiles: whether it compiles programs worth caching on disk.
      more_help: the text that `--help` shows after the arguments; made only when needed.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    compiles: bool = False
    more_help: Callable[[], str] | None = None


def config_arguments(parser: argparse.ArgumentParser, help: str, key: str = "key") -> None:
    """Adds a YAML file and overrides of its values."""
    parser.add_argument("config", metavar="CONFIG", help=help)
    overrides_argument(parser, key)


def overrides_argument(parser: argparse.ArgumentParser, key: str = "key") -> None:
    """Adds `key=value …`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar=f"{key}=value",
        help="options that take the place of those in the file, such as data.rows=8",
    )
