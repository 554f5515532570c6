"""Resuming a stopped run: the flags for it, and the exact command to do it."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shlex
from collections.abc import Iterator

_FLAGS = {
    "allow_changes": "resume although settings, models or data are others than before",
    "overwrite": "replace what an earlier run left in the folder",
}
"""Options of `run` that are said for one start, as flags."""


def overwrite_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what} if it is there")


def write_new(file: pathlib.Path, text: str) -> None:
    """Writes a file that `--out` names.

    Raises:
      ValueError: the file exists already, or its folder does not.
    """
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise ValueError(
            f"{file} is there already and stays as it is; give another file with --out, or remove "
            "it first"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{file}: there is no folder {file.parent}; make it first, or give another --out"
        ) from None


def run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a run."""
    for name, help in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=help)


def with_flags(parsed: argparse.Namespace, section: str = "run") -> list[str]:
    """The overrides on the command line, including those from the flags.

    Args:
      parsed: from a parser with `run_flags`.
      section: the section of the run's options.
    """
    given = [f"{section}.{name}=true" for name in _FLAGS if getattr(parsed, name)]
    return [*parsed.overrides, *given]


@contextlib.contextmanager
def say_how_to_go_on(parsed: argparse.Namespace, section: str = "run") -> Iterator[None]:
    """Adds the command that resumes the run to the message of a stopped run."""
    from jaxalign.parallel import distributed
    from jaxalign.run.storage import StorageError

    try:
        yield
    except (distributed.Preempted, StorageError) as stopped:
        raise type(stopped)(
            f"{stopped}\ngo on with: {command_to_go_on(parsed, section)}"
        ) from stopped


def command_to_go_on(parsed: argparse.Namespace, section: str = "run") -> str:
    """The command line that resumes this command's run.

    It resumes if there is a checkpoint, and starts anew if the run stopped before its first one.
    """
    resume = f"{section}.resume"
    one_off = tuple(f"{section}.{name}=" for name in ("resume", *_FLAGS))
    kept = [text for text in parsed.overrides if not text.startswith(one_off)]
    return shlex.join(["jaxalign", parsed.command, parsed.config, *kept, f"{resume}=auto"])
