"""The commands that help to write a configuration: `options` and `init`."""

from __future__ import annotations

import argparse
import pathlib
import re

from jaxalign.commands.command import Command
from jaxalign.commands.going_on import write_new

_SHORT = {"grpo": "ppo_grpo", "rloo": "ppo_rloo"}


def _options_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "section",
        nargs="*",
        help="such as ppo, data or model.lora, or one option such as ppo.kl_coef; all sections by "
        "name if none",
    )


def _options(parsed: argparse.Namespace) -> None:
    from jaxalign.commands.options.table import all_sections, find, first_sentence, show

    if parsed.section:
        print("\n\n".join(show(find(name)) for name in parsed.section))
        return
    for name, section in all_sections().items():
        first = first_sentence(section.help)
        print(f"{name:<28}{first} ({len(section.options)} options)")
    print("\njaxalign options SECTION lists its options: defaults, units and meanings.")


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        help="sft, reward, dpo, kto, ppo, grpo, rloo, pipeline, or any recipe, such as "
        "llama-3.1-8b/ppo; the list of all if none",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="file to write (NAME.yaml here if none); - prints it"
    )


def _init(parsed: argparse.Namespace) -> None:
    from jaxalign.run.config.recipes import recipe_path, recipes

    if parsed.name is None:
        print("\n".join(recipes()))
        return
    path = recipe_path(_SHORT.get(parsed.name, parsed.name))
    default = f"{parsed.name.removeprefix('recipe:').replace('/', '-')}.yaml"
    target = default if parsed.out is None else parsed.out
    text = _as_own(path.read_text(encoding="utf-8"), "FILE" if target == "-" else target)
    if target == "-":
        print(text, end="")
        return
    file = pathlib.Path(target).expanduser()
    write_new(file, text)
    command = path.stem.partition("_")[0]
    print(f"{file}: edit model, data and run.folder, then: jaxalign {command} {file}")


def _as_own(text: str, target: str) -> str:
    """A recipe's text with the commands in its comments for the file that it becomes."""
    return re.sub(r"(?m)^(#.*jaxalign \w+ )configs/\S+\.yaml", lambda m: m[1] + target, text)


COMMANDS = (
    Command("init", "write a commented configuration to start from", _init_arguments, _init),
    Command(
        "options",
        "the options of a configuration: default, unit and meaning",
        _options_arguments,
        _options,
    ),
)
