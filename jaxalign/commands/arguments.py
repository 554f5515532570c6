"""The argument parser: help with defaults, versions, and unknown options."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from typing import NoReturn


class _Formatter(argparse.HelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        shown = (
            action.option_strings
            and not isinstance(action.default, bool)
            and action.default not in (None, argparse.SUPPRESS)
            and "default" not in text
        )
        return f"{text} (default %(default)s)" if shown else text


class Parser(argparse.ArgumentParser):
    """An argument parser whose help may have more text after the arguments.

    Attributes:
      more_help: makes the text after the arguments; None: no text.
    """

    more_help: Callable[[], str] | None = None

    def __init__(self, *args, **options):
        super().__init__(*args, **{"formatter_class": _Formatter} | options)

    def error(self, message: str) -> NoReturn:
        """Exits with the message, and a remedy if a configuration is missing."""
        if message.endswith("required: CONFIG"):
            message += "; give a YAML file (`jaxalign init` writes one) or recipe:NAME"
        super().error(message)

    def format_help(self) -> str:
        """The help, with the text of `more_help` if there is any."""
        text = super().format_help()
        return text if self.more_help is None else f"{text}\n{self.more_help()}\n"


def version() -> str:
    """Versions of this package and of its main dependencies, on one line."""
    try:
        own = importlib.metadata.version("jaxalign")
    except importlib.metadata.PackageNotFoundError:
        own = "from a folder that is not installed"
    others = " ".join(f"{name} {importlib.metadata.version(name)}," for name in ("jax", "flax"))
    return f"jaxalign {own} ({others} Python {platform.python_version()})"


def unrecognized(
    command: str, rest: Sequence[str], given: Sequence[str], takes_overrides: bool
) -> str:
    """The message for arguments that a command does not know.

    Args:
      command: its name.
      rest: the unknown arguments.
      given: all arguments.
      takes_overrides: whether it takes `key=value`.
    """
    message = f"unrecognized arguments: {' '.join(rest)}"
    option = next((text for text in rest if text.startswith("-")), None)
    if option is None or not takes_overrides:
        return f"{message}; see jaxalign {command} --help"
    name, has_value, value = option.lstrip("-").partition("=")
    if not has_value:
        at = list(given).index(option) + 1
        value = given[at] if at < len(given) and not given[at].startswith("--") else "VALUE"
    keys = _keys(command, name.replace("-", "_"))
    if len(keys) > 3 or not keys:
        keys = [f"SECTION.{name.replace('-', '_')}" if not keys else keys[0]]
    shown = " or ".join(f"{key}={value}" for key in keys)
    return (
        f"{message}; options of the YAML are written without dashes, as key=value: {shown} "
        f"(jaxalign options lists all)"
    )


def _keys(command: str, name: str) -> list[str]:
    """The full names of the options that `name` may mean."""
    from jaxalign.commands.options.table import all_sections, sections_of_command
    from jaxalign.run.config.runs import RUNS

    sections = sections_of_command(command) if command in RUNS else all_sections().values()
    names = [option.name for section in sections for option in section.options]
    if name in names:
        return [name]
    return [full for full in names if full.split(".")[-1] == name]
