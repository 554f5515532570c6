"""The command `completion`: scripts for shells that complete commands, flags, options, recipes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.commands.arguments import Parser
from jaxalign.commands.command import Command

SHELLS = ("bash", "zsh", "fish")

_FLAG = re.compile(r"(--[a-z][\w-]*)")
_VALUES = re.compile(r"(--[a-z][\w-]*) \{([^}\s]+)\}")
_CHOICE = re.compile(r"\] \{([^}\s]+)\}$")
_IN_LISTS = re.compile(r"(data|ptx)\.(train|eval)\.|rewards\.")  # no key=value reaches these


class Words(NamedTuple):
    """The words that may follow a command.

    Attributes:
      help: the command's help, one line.
      flags: such as `--out`, and the words of an argument that takes one of a few.
      values: flag → the values that it accepts, if they are few.
      keys: options of its YAML as `section.option=`.
    """

    help: str
    flags: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    keys: tuple[str, ...]


def command(others: Sequence[Command]) -> Command:
    """The command, for a table of the others."""

    def run(parsed: argparse.Namespace) -> None:
        print(script(parsed.shell, (*others, own)), end="")

    own = Command("completion", "a script that completes commands in a shell", _arguments, run)
    return own


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def words_of(command: Command) -> Words:
    """The words that may follow a command, from its help and from the options of its YAML."""
    from jaxalign.commands.options.table import sections_of_command
    from jaxalign.run.config.runs import RUNS

    parser = Parser(prog=command.name)
    command.add_arguments(parser)
    usage = " ".join(parser.format_usage().split())
    choice = _CHOICE.search(usage)
    choices = choice[1].split(",") if choice else []
    keys: list[str] = []
    if command.name in RUNS:
        for section in sections_of_command(command.name):
            names = [option.name for option in section.options]
            keys += [f"{name}=" for name in names if not _IN_LISTS.match(name)]
    return Words(
        command.help,
        ("--help", *dict.fromkeys(_FLAG.findall(usage)), *choices),
        {flag: tuple(values.split(",")) for flag, values in _VALUES.findall(usage)},
        tuple(dict.fromkeys(keys)),
    )


def script(shell: str, commands: Sequence[Command]) -> str:
    """The script of a shell, one of `SHELLS`."""
    from jaxalign.run.config.recipes import PREFIX, recipes

    table = {command.name: words_of(command) for command in commands}
    named = [PREFIX + name for name in recipes()]
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](table, named)


_BASH = """\
# Completion of jaxalign in bash:  source <(jaxalign completion bash)
_jaxalign() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  local recipes="{recipes}"
  if ((COMP_CWORD == 1)); then
    words="{commands}"
  elif [[ $before == : && ${{COMP_WORDS[COMP_CWORD-2]-}} == recipe ]]; then
    words=${{recipes//recipe:/}} # bash splits words at a colon
  elif [[ $current == : && $before == recipe ]]; then
    words=${{recipes//recipe:/}} current=
  else
    case "${{COMP_WORDS[1]}} $before" in
{values}
      *) case "${{COMP_WORDS[1]}}" in
{cases}
      esac ;;
    esac
    [[ $current == recipe* ]] && words+=" $recipes"
  fi
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
  if [[ ${{#COMPREPLY[@]}} -gt 0 && ${{COMPREPLY[0]}} == *[=:] ]]; then compopt -o nospace; fi
}}
complete -o default -F _jaxalign jaxalign
"""


def _bash(table: dict[str, Words], recipes: Sequence[str]) -> str:
    values = [
        f'      "{name} {flag}") words="{" ".join(allowed)}" ;;'
        for name, words in table.items()
        for flag, allowed in words.values.items()
    ]
    cases = [
        f'        {name}) words="{" ".join((*words.flags, *words.keys))}" ;;'
        for name, words in table.items()
    ]
    return _BASH.format(
        recipes=" ".join(recipes),
        commands=" ".join(table),
        values="\n".join(values),
        cases="\n".join(cases),
    )


_ZSH = """\
#compdef jaxalign
# Completion of jaxalign in zsh:  source <(jaxalign completion zsh)
_jaxalign() {{
  local -a commands recipes
  commands=(
{commands}
  )
  recipes=({recipes})
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  case "${{words[2]}} ${{words[CURRENT-1]}}" in
{values}
  esac
  case "${{words[2]}}" in
{cases}
  esac
  compadd -- $recipes
  _files
}}
(( $+functions[compdef] )) && compdef _jaxalign jaxalign
"""


def _zsh(table: dict[str, Words], recipes: Sequence[str]) -> str:
    commands = [f"    {_quoted(f'{name}:{words.help}')}" for name, words in table.items()]
    values = [
        f'    "{name} {flag}") compadd -- {" ".join(allowed)}; return ;;'
        for name, words in table.items()
        for flag, allowed in words.values.items()
    ]
    cases = []
    for name, words in table.items():
        keys = f"; compadd -S '' -- {' '.join(words.keys)}" if words.keys else ""
        cases.append(f"    {name}) compadd -- {' '.join(words.flags)}{keys} ;;")
    return _ZSH.format(
        commands="\n".join(commands),
        recipes=" ".join(recipes),
        values="\n".join(values),
        cases="\n".join(cases),
    )


def _fish(table: dict[str, Words], recipes: Sequence[str]) -> str:
    lines = ["# Completion of jaxalign in fish:  jaxalign completion fish | source"]
    for name, words in table.items():
        help_ = _quoted(words.help)
        lines.append(f"complete -c jaxalign -n __fish_use_subcommand -f -a {name} -d {help_}")
    for name, words in table.items():
        start = f"complete -c jaxalign -n '__fish_seen_subcommand_from {name}'"
        for flag in words.flags:
            allowed = words.values.get(flag)
            more = f" -x -a '{' '.join(allowed)}'" if allowed else ""
            what = f"-l {flag[2:]}" if flag.startswith("--") else f"-f -a {flag}"
            lines.append(f"{start} {what}{more}")
        if words.keys:
            lines.append(f"{start} -a '{' '.join((*words.keys, *recipes))}'")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Text in single quotes, quoted for all three shells."""
    return "'" + text.replace("\\", "\\\\").replace("'", "’") + "'"
