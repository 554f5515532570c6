"""The commands that convert models: `export` and `import`."""

from __future__ import annotations

import argparse

from jaxalign.commands.command import Command
from jaxalign.commands.going_on import overwrite_argument


def _dtype_argument(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument(
        "--dtype",
        default="source",
        choices=("source", "float32", "bfloat16", "float16"),
        help=f"of the tensors written; source (the default) is {source}",
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run's folder")
    parser.add_argument("--out", required=True, help="folder to write")
    overwrite_argument(parser, "the model in OUT")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    which.add_argument("--best", action="store_true", help="the best one, by run.keep_best")
    parser.add_argument(
        "--part", choices=("policy", "critic"), help="of a run that trains both; default policy"
    )
    _dtype_argument(parser, "that of the model the run started from")


def _export(parsed: argparse.Namespace) -> None:
    from jaxalign.data.paths import check_free
    from jaxalign.run.export import export_run

    check_free(parsed.out, "--out", overwrite=parsed.overwrite)
    done = export_run(
        parsed.folder,
        parsed.out,
        parsed.step,
        best=parsed.best,
        part=parsed.part,
        dtype=parsed.dtype,
    )
    print(f"{done.table}\ncheckpoint {done.step} of {parsed.folder} → {parsed.out}")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder, .gguf file or hub id")
    parser.add_argument("--out", required=True, help="folder to write")
    overwrite_argument(parser, "the model in OUT")
    _dtype_argument(parser, "that of the source, or float32 where it is quantised")


def _import(parsed: argparse.Namespace) -> None:
    from jaxalign.data.paths import check_free
    from jaxalign.run.export import import_model

    check_free(parsed.out, "--out", overwrite=parsed.overwrite, sources=[parsed.source])
    done = import_model(parsed.source, parsed.out, dtype=parsed.dtype)
    print(f"{done.table}\n{parsed.source} → {parsed.out}")


COMMANDS = (
    Command(
        "export", "write a run's checkpoint as a Hugging Face folder", _export_arguments, _export
    ),
    Command(
        "import",
        "write a model as an Orbax folder, which loads without conversion",
        _import_arguments,
        _import,
    ),
)
