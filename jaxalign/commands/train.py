"""The commands that train: one for each algorithm, and `pipeline`."""

from __future__ import annotations

import argparse
import functools

from jaxalign.commands.algorithms import algorithms
from jaxalign.commands.command import Command, config_arguments
from jaxalign.commands.going_on import run_flags, say_how_to_go_on, with_flags
from jaxalign.commands.out_of_memory import explain_out_of_memory

_EVERY_STAGE = "defaults.run"


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, "YAML file, or recipe:NAME; see `jaxalign init`")
    run_flags(parser)


def _options(algorithm: str) -> str:
    from jaxalign.commands.options.table import sections_of_command, show_briefly

    return show_briefly(sections_of_command(algorithm))


def _train(parsed: argparse.Namespace) -> None:
    from jaxalign.parallel import distributed
    from jaxalign.run.config.runs import load_config
    from jaxalign.run.loop import train
    from jaxalign.run.remote import below
    from jaxalign.run.summary import summary

    with distributed.session(), say_how_to_go_on(parsed):
        config = load_config(parsed.command, parsed.config, with_flags(parsed))
        with explain_out_of_memory(config):
            result = train(config)
        for name, value in result.after.items():
            start = f" (at the start {result.before[name]:.4g})" if name in result.before else ""
            print(f"held out: {name} {value:.4g}{start}")
        line = summary(result.before, result.after, result.history)
        if line:
            print(f"{parsed.command}: {line}")
        print(f"run folder: {config.run.folder}")
        if result.model is not None:
            print(f"model: {below(config.run.folder, 'model')}")


def _pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(
        parser,
        "YAML file, or recipe:pipeline; see `jaxalign init`",
        key="stage.key",
    )
    run_flags(parser)


def _pipeline(parsed: argparse.Namespace) -> None:
    from jaxalign.parallel import distributed
    from jaxalign.run.pipeline import load_stages, run_stages
    from jaxalign.run.summary import summary

    with distributed.session(), say_how_to_go_on(parsed, _EVERY_STAGE):
        stages = load_stages(parsed.config, with_flags(parsed, _EVERY_STAGE))
        results = run_stages(stages, explain_out_of_memory)
        folders = {name: stage.run.folder for name, stage in stages}
        for name, result in results.items():
            print(f"{name}: {folders[name]} ({result.seconds:.0f} s)")
            line = summary(result.before, result.after, result.history)
            if line:
                print(f"{name}: {line}")


def commands() -> list[Command]:
    """A command for each algorithm, those registered from outside too, and `pipeline`."""
    training = [
        Command(
            name,
            help,
            _train_arguments,
            _train,
            compiles=True,
            more_help=functools.partial(_options, name),
        )
        for name, help in algorithms().items()
    ]
    help = "several stages from one YAML"
    return [*training, Command("pipeline", help, _pipeline_arguments, _pipeline, compiles=True)]
