"""The commands `report` (shows runs) and `data` (shows what a run would train on)."""

from __future__ import annotations

import argparse
import os
import sys

from jaxalign.commands.algorithms import algorithms
from jaxalign.commands.command import Command, config_arguments
from jaxalign.commands.going_on import overwrite_argument
from jaxalign.parallel.platforms import leave_accelerators_alone


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="RUN",
        help="a run's folder, or one that holds several; several are compared",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="HTML file to write; by default report.html, in the folder if it is only one, else "
        "here",
    )
    overwrite_argument(parser, "a file that is no report")


def _report(parsed: argparse.Namespace) -> None:
    from jaxalign.commands.report.runs import write_report

    print(write_report(parsed.folders, parsed.out, parsed.overwrite))


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, f"YAML file of {', '.join(algorithms())}")
    parser.add_argument(
        "--as", dest="algorithm", choices=tuple(algorithms()), help="if the YAML does not say"
    )
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="how many to show")
    parser.add_argument("--batches", type=int, metavar="N", help="look at the first N only")
    parser.add_argument("--html", metavar="FILE", help="write a page instead")


def _data(parsed: argparse.Namespace) -> None:
    leave_accelerators_alone()

    from jaxalign.commands.report.data import inspect_data, show, write_page

    views = inspect_data(
        parsed.config, parsed.overrides, parsed.algorithm, parsed.examples, parsed.batches
    )
    if parsed.html is not None:
        print(write_page(views, parsed.html))
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join(show(view, colour) for view in views))


COMMANDS = (
    Command(
        "report",
        "runs, or a pipeline's stages, compared on one HTML page",
        _report_arguments,
        _report,
    ),
    Command("data", "what a run would be trained on", _data_arguments, _data),
)
