"""The command `quickstart`."""

from __future__ import annotations

import argparse

from jaxalign.commands.command import Command, overrides_argument


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id to start from")
    parser.add_argument(
        "--language", default="en", choices=("en", "zh"), help="of the example data"
    )
    parser.add_argument("--out", default="runs/quickstart", help="folder to write to")
    overrides_argument(parser, key="stage.key")


def _run(parsed: argparse.Namespace) -> None:
    from jaxalign.commands.quickstart.stages import quickstart
    from jaxalign.parallel import distributed

    with distributed.session():
        quickstart(parsed.model, parsed.language, parsed.out, parsed.overrides)


COMMAND = Command(
    "quickstart",
    "SFT, reward model, PPO and DPO on example data, side by side",
    _arguments,
    _run,
    compiles=True,
)
