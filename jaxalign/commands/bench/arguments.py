"""The command `bench`: its arguments, which select one of two measurements."""

from __future__ import annotations

import argparse

from jaxalign.commands.algorithms import load_any_config
from jaxalign.commands.command import Command, overrides_argument

_NUMBERS = {
    "rows": "rows of a step: pairs, prompts",
    "length": "tokens of a row, or of a prompt",
    "new_tokens": "tokens of an answer",
    "micro_batches": "parts of a step",
    "repeats": "measured steps; the table shows their medians",
}
_TEXTS = {
    "dtype": "of activations: float32, bfloat16",
    "remat": "none, dots, block, offload",
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="measure this run's own model and data instead")
    overrides_argument(parser)
    parser.add_argument(
        "--what", nargs="+", metavar="WHAT", help="algorithms, or generate; all if none"
    )
    parser.add_argument(
        "--sizes", nargs="+", metavar="SIZE", help="XS S M Qwen3-0.6B 0.5B 1B 3B 8B; S M if none"
    )
    parser.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="full padded packed; full packed if none"
    )
    for name, help in _NUMBERS.items():
        parser.add_argument(_flag(name), type=int, help=help)
    for name, help in _TEXTS.items():
        parser.add_argument(_flag(name), help=help)
    parser.add_argument("--out", metavar="FILE", help="append the records to it as JSON lines")


def _run(parsed: argparse.Namespace) -> int:
    return _measure_sizes(parsed) if parsed.config is None else _measure_config(parsed)


def _measure_sizes(parsed: argparse.Namespace) -> int:
    from jaxalign.commands.bench.command import bench

    layouts = parsed.layouts or ["full", "packed"]
    options = {name: getattr(parsed, name) for name in (*_NUMBERS, *_TEXTS)}
    records = bench(parsed.what, parsed.sizes or ["S", "M"], layouts, options, parsed.out)
    return 1 if any("error" in record for record in records) else 0


def _measure_config(parsed: argparse.Namespace) -> int:
    from jaxalign.commands.bench import measure_config, show
    from jaxalign.commands.bench.command import write

    sizes = [name for name in (*_NUMBERS, *_TEXTS) if name != "repeats"]
    given = [name for name in sizes if getattr(parsed, name) is not None]
    given += [name for name in ("what", "sizes", "layouts") if getattr(parsed, name)]
    if given:
        raise ValueError(
            f"{_flag(given[0])} with a configuration: wanted key=value overrides of it"
        )
    algorithm, config = load_any_config(parsed)
    record = measure_config(algorithm, config, parsed.repeats or 7)
    write(record, parsed.out)
    print(show([record]))
    return 0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


COMMAND = Command(
    "bench",
    "speed and memory of training and generation here, beside the machine's limit",
    _arguments,
    _run,
)
