"""The sections of every command's configuration, by name, and how they are printed."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable

from jaxalign.commands.options.describe import Option, Section, sections_of

_COMMON = ("model", "data", "run", "optimizer", "mesh")
_MARGIN = 36  # columns before the meaning of an option in `--help`


def all_sections() -> dict[str, Section]:
    """Name → section, of all commands that take a YAML.

    Top-level options of a single algorithm, such as `ppo_epochs`, are in that algorithm's section,
    before its own options.
    """
    from jaxalign.commands.synth.config import SynthRun
    from jaxalign.run.config.runs import RUNS

    found: dict[str, Section] = {}
    for algorithm, cls in RUNS.items():
        top, *inner = sections_of(cls)
        for section in inner:
            if section.name == algorithm:
                own = [o for o in top.options if o.name not in (*_COMMON, algorithm)]
                section = section._replace(options=(*own, *section.options))
            found.setdefault(section.name, section)
    top, *inner = sections_of(SynthRun)
    found["synth"] = top._replace(name="synth")
    found |= {section.name: section for section in inner if section.name not in found}
    return found


def sections_of_command(name: str) -> list[Section]:
    """The sections of one command's file: its own options, what every run has, what it may add."""
    from jaxalign.run.config.runs import RUNS

    inner = sections_of(RUNS[name])[1:]
    known = all_sections()
    own = [s for s in inner if s.name.split(".")[0] not in _COMMON and s.name != name]
    common = [s for s in inner if s.name.split(".")[0] in _COMMON]
    return [known[name], *common, *own]


def find(name: str) -> Section:
    """The section of this name, or one option of it as a section.

    Raises:
      ValueError: there is none; the message names the nearest.
    """
    known = all_sections()
    if name in known:
        return known[name]
    options = {option.name: section for section in known.values() for option in section.options}
    if name in options:
        section = options[name]
        return section._replace(options=tuple(o for o in section.options if o.name == name))
    # `ppo.ppo_epochs` and `beta`: the right name in the wrong section.
    leaf = name.split(".")[-1]
    near = [full for full in options if full.split(".")[-1] == leaf]
    near = near or difflib.get_close_matches(name, [*known, *options], 3, 0.6)
    hint = f"did you mean {', '.join(near[:3])}? " if near else ""
    raise ValueError(f"{name!r}: no section and no option; {hint}sections: {', '.join(known)}")


def show(section: Section, width: int = 100) -> str:
    """A section in full: each option with default and type, and its meaning below."""
    lines = textwrap.wrap(f"{section.name}: {section.help}", width)
    for option in section.options:
        lines += ["", f"{_assignment(option)}   ({option.type})"]
        lines += textwrap.wrap(option.help, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def show_briefly(sections: Iterable[Section], width: int = 100) -> str:
    """Sections with a few words per option, for `--help`."""
    lines = ["options of the YAML with their defaults; key=value behind the file overrides one:"]
    seen: dict[tuple[str | None, ...], str] = {}
    for section in sections:
        alike = tuple(f"{_leaf(option)} {option.default}" for option in section.options)
        if alike in seen:
            lines += ["", f"{section.name}: as {seen[alike]}"]
            continue
        seen[alike] = section.name
        lines += ["", f"{section.name}:"]
        for option in section.options:
            head = f"  {_assignment(option)}"
            body = textwrap.wrap(first_sentence(option.help), width - _MARGIN) or [""]
            if len(head) >= _MARGIN - 1:
                lines.append(head)
                head = ""
            lines.append(f"{head:<{_MARGIN}}{body[0]}")
            lines += [" " * _MARGIN + line for line in body[1:]]
    return "\n".join([*lines, "", "jaxalign options SECTION says more about each."])


def first_sentence(text: str) -> str:
    """The text up to the first full stop that does not end an abbreviation."""
    return re.split(r"(?<!et al)(?<!Dr)\. (?=[A-Z])", text, maxsplit=1)[0].rstrip(".")


def _leaf(option: Option) -> str:
    return option.name.split(".")[-1]


def _assignment(option: Option) -> str:
    return f"{option.name} {'must be given' if option.default is None else '= ' + option.default}"
