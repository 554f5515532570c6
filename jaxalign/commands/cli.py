"""Commands: `jaxalign sft|reward|dpo|kto|ppo|pipeline CONFIG [key=value …]`, `quickstart`, …

Each command's file declares its arguments and its function; this file has the table of commands.
Invalid input ends with one message and exit status 2; `JAXALIGN_TRACEBACK=1` shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from jaxalign.commands.arguments import Parser, unrecognized, version
from jaxalign.commands.command import Command

_TRY_AGAIN = 75  # EX_TEMPFAIL: the same command with run.resume=true continues the run


def commands() -> tuple[Command, ...]:
    """All commands, in the order in which `--help` shows them.

    They are imported here because some need JAX, which this file must not load before the process
    has been settled (`jaxalign.commands.startup`).
    """
    from jaxalign.commands import answer, chat, completion, export, fetch, plan, train, verify
    from jaxalign.commands.bench import arguments as bench
    from jaxalign.commands.convert_trl import command as convert_trl
    from jaxalign.commands.doctor import command as doctor
    from jaxalign.commands.eval import command as evaluate
    from jaxalign.commands.explain import command as explain
    from jaxalign.commands.options import command as options
    from jaxalign.commands.quickstart import command as quickstart
    from jaxalign.commands.report import command as report
    from jaxalign.commands.synth import command as synth

    found = (
        *train.commands(),
        quickstart.COMMAND,
        *options.COMMANDS,
        convert_trl.COMMAND,
        *answer.COMMANDS,
        chat.COMMAND,
        evaluate.COMMAND,
        *export.COMMANDS,
        fetch.COMMAND,
        plan.COMMAND,
        bench.COMMAND,
        *report.COMMANDS,
        explain.COMMAND,
        verify.COMMAND,
        synth.COMMAND,
        doctor.COMMAND,
    )
    return (*found, completion.command(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(version())
        return 0
    # Only transformers' tokenizers are used, so hide its advice to install torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    parsed = parse(given)
    command: Command = parsed.subcommand

    from jaxalign.commands.startup.freed_memory import return_freed_memory
    from jaxalign.commands.startup.program_cache import cache_programs
    from jaxalign.parallel import distributed

    try:
        if command.compiles:
            cache_programs()
            return_freed_memory()
        return command.run(parsed) or 0
    except distributed.Preempted as stopped:
        print(f"jaxalign {command.name}: {stopped}", file=sys.stderr)
        return _TRY_AGAIN
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        from jaxalign.run.storage import describe

        message, status = describe(error)
        print(f"jaxalign {command.name}: error: {message}", file=sys.stderr)
        distributed.exit_if_failed(status)
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments; `subcommand` is the `Command`. Exits on an invalid command line."""
    parser = Parser(prog="jaxalign", description="Align language models with people, in JAX.")
    parser.add_argument("--version", action="store_true", help="print versions and end")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands():
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        subparser.more_help = command.more_help
        command.add_arguments(subparser)
        subparser.set_defaults(subcommand=command)
    parsed, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(parsed, "overrides")
    # argparse ends a list of arguments at the first option; later arguments belong to the list too.
    for name in ("overrides", "prompts"):
        if rest and hasattr(parsed, name) and not any(text.startswith("-") for text in rest):
            setattr(parsed, name, getattr(parsed, name) + rest)
            rest = []
    if rest:
        given = sys.argv[1:] if arguments is None else arguments
        chosen = subparsers.choices[parsed.command]
        chosen.error(unrecognized(parsed.command, rest, given, takes_overrides))
    return parsed


if __name__ == "__main__":
    from jaxalign.commands.startup.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()
    sys.exit(main())
