"""Commands: `jaxalign sft|reward|dpo|kto|ppo|pipeline CONFIG [key=value …]`, `quickstart`, …

Each command's file declares its arguments and what it runs; here is the table of them. Wrong input
ends with one message and exit status 2; `JAXALIGN_TRACEBACK=1` shows where it arose.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from jaxalign.commands.command import Command

_TRY_AGAIN = 75  # EX_TEMPFAIL: the same command with run.resume=true continues the run


def commands() -> tuple[Command, ...]:
    """All commands, in the order in which `--help` shows them.

    They are imported here because some need JAX, which this file must not load before the process
    has been settled (`jaxalign.commands.startup`).
    """
    from jaxalign.commands import answer, export, plan, train
    from jaxalign.commands.bench import arguments as bench
    from jaxalign.commands.quickstart import command as quickstart
    from jaxalign.commands.report import command as report
    from jaxalign.commands.synth import command as synth

    return (
        *train.commands(),
        quickstart.COMMAND,
        *answer.COMMANDS,
        *export.COMMANDS,
        plan.COMMAND,
        bench.COMMAND,
        *report.COMMANDS,
        synth.COMMAND,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    # Only the tokenizers of transformers are used, so its advice to install torch is no use here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    parsed = parse(arguments)
    command: Command = parsed.subcommand

    from jaxalign.commands.startup.program_cache import cache_programs
    from jaxalign.parallel import distributed

    if command.compiles:
        cache_programs()
    try:
        return command.run(parsed) or 0
    except distributed.Preempted as stopped:
        print(f"jaxalign {command.name}: {stopped}", file=sys.stderr)
        return _TRY_AGAIN
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        print(f"jaxalign {command.name}: error: {error}", file=sys.stderr)
        distributed.exit_if_failed(2)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command; `subcommand` is the `Command`. A wrong command line exits."""
    parser = argparse.ArgumentParser(
        prog="jaxalign", description="Align language models with people, in JAX."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands():
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(subcommand=command)
    parsed, rest = parser.parse_known_args(arguments)
    # argparse ends the list of overrides at the first option; those after it belong to it too.
    if rest and hasattr(parsed, "overrides") and not any(text.startswith("-") for text in rest):
        parsed.overrides, rest = parsed.overrides + rest, []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxalign", description="Align language models with people, in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("config", help="YAML file (see configs/)")
        command.add_argument("overrides", nargs="*", metavar="key=value")
        command.set_defaults(run=_train)

    command = commands.add_parser("pipeline", help="several stages from one YAML")
    command.add_argument("config", help="YAML file (see configs/pipeline.yaml)")
    command.add_argument("overrides", nargs="*", metavar="stage.key=value")
    command.set_defaults(run=_pipeline)

    command = commands.add_parser(
        "quickstart", help="SFT, reward model, PPO and DPO on example data, side by side"
    )
    command.add_argument(
        "--model", required=True, help="folder, .gguf file or hub id to start from"
    )
    command.add_argument("--language", default="en", choices=("en", "zh"))
    command.add_argument("--out", default="runs/quickstart", help="folder to write to")
    command.add_argument("overrides", nargs="*", metavar="stage.key=value")
    command.set_defaults(run=_quickstart)

    command = commands.add_parser("generate", help="answer prompts")
    _sampling_arguments(command)
    command.add_argument(
        "prompts", nargs="*", help="read from standard input, a line each, if none"
    )
    command.add_argument(
        "--best-of", type=int, metavar="N", help="sample N answers, show the one scored best"
    )
    command.add_argument("--reward-model", metavar="MODEL", help="what scores them")
    command.add_argument("--reward-chat-template", help="its template; its tokenizer's own if none")
    _weights_argument(command)
    command.set_defaults(run=_answers("generate"))

    command = commands.add_parser("score", help="a reward model's scores of answers, as JSON lines")
    command.add_argument("model", help="folder or hub id of a reward model")
    command.add_argument("files", nargs="+", help="rows with answers: files, folders, hub ids")
    command.add_argument("--out", help="file to write; standard output if none")
    command.add_argument("--column", default="reward", help="name of the column that is added")
    command.add_argument("--batch", type=int, default=16, help="answers scored at a time")
    command.add_argument(
        "--length", type=int, help="longest prompt with answer, tokens; no limit if none"
    )
    command.add_argument("--chat-template", help='"chatml", "none" or a jinja file')
    _weights_argument(command)
    command.set_defaults(run=_answers("score"))

    command = commands.add_parser("chat", help="talk to a model")
    _sampling_arguments(command)
    command.set_defaults(run=_answers("chat"))

    command = commands.add_parser(
        "export", help="write a run's checkpoint as a Hugging Face folder"
    )
    command.add_argument("folder", help="a run's folder")
    command.add_argument("--out", required=True)
    command.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    command.add_argument(
        "--part", choices=("policy", "critic"), help="of a run that trains both; default policy"
    )
    _dtype_argument(command, "that of the model the run started from")
    command.set_defaults(run=_export)

    command = commands.add_parser(
        "import", help="write a model as an Orbax folder, which loads without conversion"
    )
    command.add_argument("source", help="folder, .gguf file or hub id")
    command.add_argument("--out", required=True)
    _dtype_argument(command, "that of the source, or float32 where it is quantised")
    command.set_defaults(run=_import)

    command = commands.add_parser(
        "plan", help="memory, traffic and speed of a run on named devices, before renting them"
    )
    command.add_argument("config", help="YAML file; the algorithm's name may stand before it")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument(
        "--topology",
        "--devices",
        dest="topology",
        help="v4-8, v5e-16, v5p-128, v6e-256, v5e:4x4, h100:8, h100:8x16 (16 nodes), a100-80g:4, "
        "cpu:8; the devices that are present by default",
    )
    command.add_argument("--json", action="store_true", help="for programs: bytes, FLOPs, seconds")
    command.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=3,
        metavar="N",
        help="find the N (3) fastest settings that fit: mesh, remat, micro-batches, moments",
    )
    command.set_defaults(run=_plan)

    command = commands.add_parser(
        "bench", help="speed and memory of training and generation here, beside the machine's limit"
    )
    command.add_argument("config", nargs="?", help="measure this run's own model and data instead")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument(
        "--what", nargs="+", metavar="WHAT", help="an algorithm, or generate; all if none"
    )
    command.add_argument(
        "--sizes", nargs="+", metavar="SIZE", help="XS S M 0.5B 1B 3B; S M if none"
    )
    command.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="full padded packed; full packed if none"
    )
    for name, what in (
        ("rows", "rows of a step: pairs, prompts"),
        ("length", "tokens of a row, or of a prompt"),
        ("new-tokens", "of an answer"),
        ("micro-batches", "parts of a step"),
        ("repeats", "measured steps, of which medians are told"),
    ):
        command.add_argument(f"--{name}", type=int, help=what)
    command.add_argument("--dtype", help="of activations: float32, bfloat16")
    command.add_argument("--remat", help="none, dots, block, offload")
    command.add_argument("--out", metavar="FILE", help="append the records to it as JSON lines")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "report", help="a run's or a pipeline's curves and figures as one HTML page"
    )
    command.add_argument("folder", help="a run's folder, or one that holds several")
    command.add_argument("--out", help="HTML file to write; report.html in the folder by default")
    command.set_defaults(run=_report)

    command = commands.add_parser("data", help="what a run would be trained on")
    command.add_argument("config", help="YAML file of sft, reward, dpo or ppo")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument(
        "--as", dest="algorithm", choices=tuple(_COMMANDS), help="if the YAML does not say"
    )
    command.add_argument("--examples", type=int, default=3, metavar="N", help="how many to show")
    command.add_argument("--batches", type=int, metavar="N", help="look at the first N only")
    command.add_argument("--html", metavar="FILE", help="write a page instead")
    command.set_defaults(run=_data)

    command = commands.add_parser("synth", help="make tasks or preference pairs with a model")
    command.add_argument("config", help="YAML file (see configs/synth_instruct.yaml)")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.set_defaults(run=_synth)
    return parser


def _dtype_argument(command: argparse.ArgumentParser, source: str) -> None:
    command.add_argument(
        "--dtype",
        default="source",
        choices=("source", "float32", "bfloat16", "float16"),
        help=f"of the tensors written; source (the default) is {source}",
    )


def _sampling_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="folder, .gguf file or hub id")
    command.add_argument("--max-new-tokens", type=int, default=128)
    command.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    command.add_argument("--top-k", type=int, default=0, help="0 is off")
    command.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--chat-template", help='"chatml", "none" or a jinja file')


def _weights_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights",
        metavar="NAME=W,…",
        help="of a reward model's attributes, for one score: helpfulness=0.7,verbosity=-0.3",
    )


def _train(parsed: argparse.Namespace) -> int:
    from jaxalign.run.config.runs import load_config
    from jaxalign.run.loop import train

    distributed.start()
    with distributed.guard():
        result = train(load_config(parsed.command, parsed.config, parsed.overrides))
    if not distributed.is_main():
        return 0
    for name, value in result.after.items():
        start = f" (at the start {result.before[name]:.4g})" if name in result.before else ""
        print(f"held out: {name} {value:.4g}{start}")
    print(f"run folder: {result.folder}")
    if result.model is not None:
        print(f"model: {result.model}")
    return 0


def _pipeline(parsed: argparse.Namespace) -> int:
    from jaxalign.run.pipeline import load_stages, run_stages

    distributed.start()
    with distributed.guard():
        results = run_stages(load_stages(parsed.config, parsed.overrides))
    for name, result in results.items() if distributed.is_main() else ():
        print(f"{name}: {result.folder} ({result.seconds:.0f} s)")
    return 0


def _quickstart(parsed: argparse.Namespace) -> int:
    from jaxalign.commands.quickstart.stages import quickstart

    quickstart(parsed.model, parsed.language, parsed.out, parsed.overrides)
    return 0


def _answers(name: str) -> Callable[[argparse.Namespace], int]:
    """A command of `cli_answers`."""

    def run(parsed: argparse.Namespace) -> int:
        from jaxalign.commands import answer

        return getattr(answer, name)(parsed)

    return run


def _export(parsed: argparse.Namespace) -> int:
    from jaxalign.run.export import export_run

    done = export_run(parsed.folder, parsed.out, parsed.step, part=parsed.part, dtype=parsed.dtype)
    print(f"{done.table}\ncheckpoint {done.step} of {parsed.folder} → {parsed.out}")
    return 0


def _import(parsed: argparse.Namespace) -> int:
    from jaxalign.run.export import import_model

    done = import_model(parsed.source, parsed.out, dtype=parsed.dtype)
    print(f"{done.table}\n{parsed.source} → {parsed.out}")
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    kind, _, count = (parsed.topology or "").partition(":")
    if parsed.topology is not None:
        _leave_accelerators()
    if kind == "cpu" and count.isdecimal() and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"

    from jaxalign.plan import make_plan, search_plans

    algorithm, config = _algorithm_and_config(parsed)

    def say(text: str) -> None:
        print(f"plan: {text}", file=sys.stderr, flush=True)

    if parsed.search is not None:
        if parsed.topology is None:
            raise ValueError("--search: wanted --topology with it, e.g. --topology v5p-128")
        if parsed.search < 1:
            raise ValueError(f"--search {parsed.search}: wanted 1 or more")
        found = search_plans(algorithm, config, parsed.topology, say, count=parsed.search)
        if parsed.json:
            rows = [{"overrides": o, "plan": dataclasses.asdict(plan)} for o, plan in found]
            print(json.dumps(rows))
        for overrides, plan in () if parsed.json else found:
            print(f"{' '.join(overrides)}\n{plan}\n")
        return 0
    plan = make_plan(algorithm, config, parsed.topology, say)
    print(json.dumps(dataclasses.asdict(plan)) if parsed.json else plan)
    return 0


def _algorithm_and_config(parsed: argparse.Namespace) -> tuple[str, Any]:
    """Of a YAML file, before which the algorithm's name may stand."""
    from jaxalign.run.config.runs import algorithm_of, load_config
    from jaxalign.run.config.yaml import override, read_yaml

    path, overrides, algorithm = parsed.config, parsed.overrides, None
    if path in _COMMANDS:
        if not overrides:
            raise ValueError(f"{parsed.command} {path}: wanted a YAML file behind it")
        algorithm, (path, *overrides) = path, overrides
    values = override(read_yaml(path), overrides)
    told = f"write it before the file: {parsed.command} sft FILE"
    algorithm = algorithm or algorithm_of(values, told)
    return algorithm, load_config(algorithm, values)


def _bench(parsed: argparse.Namespace) -> int:
    from jaxalign.commands.bench import measure_config, show
    from jaxalign.commands.bench.command import bench, write

    names = ("rows", "length", "new_tokens", "micro_batches", "repeats", "dtype", "remat")
    options = {name: getattr(parsed, name) for name in names}
    if parsed.config is None:
        layouts = parsed.layouts or ["full", "packed"]
        records = bench(parsed.what, parsed.sizes or ["S", "M"], layouts, options, parsed.out)
        return 1 if any("error" in record for record in records) else 0
    given = [name for name in names if options[name] is not None and name != "repeats"]
    given += [name for name in ("what", "sizes", "layouts") if getattr(parsed, name)]
    if given:
        raise ValueError(
            f"--{given[0].replace('_', '-')} with a configuration: wanted key=value overrides of it"
        )
    algorithm, config = _algorithm_and_config(parsed)
    record = measure_config(algorithm, config, parsed.repeats or 7)
    write(record, parsed.out)
    print(show([record]))
    return 0


def _leave_accelerators() -> None:
    """Nothing is going to run, and an accelerator that is here must not be taken."""
    import jax

    os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that are started from here
    jax.config.update("jax_platforms", "cpu")


def _report(parsed: argparse.Namespace) -> int:
    from jaxalign.commands.report.runs import write_report

    print(write_report(parsed.folder, parsed.out))
    return 0


def _data(parsed: argparse.Namespace) -> int:
    _leave_accelerators()

    from jaxalign.commands.report.data import inspect_data, show, write_page

    views = inspect_data(
        parsed.config, parsed.overrides, parsed.algorithm, parsed.examples, parsed.batches
    )
    if parsed.html is not None:
        print(write_page(views, parsed.html))
        return 0
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join(show(view, colour) for view in views))
    return 0


def _synth(parsed: argparse.Namespace) -> int:
    from jaxalign.commands.synth.command import load_synth, run_synth

    run_synth(load_synth(parsed.config, parsed.overrides))
    return 0


if __name__ == "__main__":
    from jaxalign.commands.startup.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()
    sys.exit(main())
