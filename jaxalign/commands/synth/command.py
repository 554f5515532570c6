"""The command `synth`."""

from __future__ import annotations

import argparse

from jaxalign.commands.command import Command, config_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, "YAML file, or recipe:NAME; `jaxalign init synth_instruct` writes one")


def _run(parsed: argparse.Namespace) -> None:
    from jaxalign.commands.synth.config import load_synth
    from jaxalign.commands.synth.run import run_synth

    run_synth(load_synth(parsed.config, parsed.overrides))


COMMAND = Command(
    "synth", "make tasks or preference pairs with a model", _arguments, _run, compiles=True
)
