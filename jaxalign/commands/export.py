"""The commands that convert models: `export` and `import`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jaxalign.commands.command import Command
from jaxalign.commands.going_on import overwrite_argument

if TYPE_CHECKING:
    from jaxalign.run.export_as import Written


def _dtype_argument(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument(
        "--dtype",
        default="source",
        choices=("source", "float32", "bfloat16", "float16"),
        help=f"of the tensors written; source (the default) is {source}",
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run's folder, or a model: folder, .gguf file or hub id")
    parser.add_argument("--out", required=True, help="folder to write")
    overwrite_argument(parser, "the model in OUT")
    parser.add_argument(
        "--to",
        nargs="+",
        metavar="FORMAT",
        help="hf (the default), gguf, orbax, or the adapters alone: peft, gguf-lora; several get a "
        "folder each in OUT",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    which.add_argument("--best", action="store_true", help="the best one, by run.keep_best")
    parser.add_argument(
        "--part", choices=("policy", "critic"), help="of a run that trains both; default policy"
    )
    _dtype_argument(parser, "that of the model the run started from")
    parser.add_argument(
        "--gguf-dtype",
        type=str.upper,
        default="F16",
        choices=("F32", "F16", "BF16", "Q8_0"),
        help="of the matrices in a GGUF file; default F16",
    )
    _adapter_arguments(parser)
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="of a run with model.quantize: merge into the base as it was trained, rounded, and "
        "not into the floats of its source",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="read the files again and compare log-probs on 16 prompts (done by default; --verify "
        "also has transformers read them, where torch is there)",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to this repository, with a model card"
    )
    parser.add_argument(
        "--public", action="store_true", help="of a repository that --push makes: not private"
    )


def _adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="put it on the model: PEFT's folder, hub id or .gguf file; several: their sum",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of the adapters; 1 each by default"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="what the model was tuned from: make it an adapter of that",
    )
    parser.add_argument("--rank", type=int, default=16, help="of that adapter; default 16")


def _weighted(parsed: argparse.Namespace) -> tuple[tuple[str, float], ...]:
    """The adapters with their weights."""
    weights = parsed.weights or [1.0] * len(parsed.adapter)
    if len(weights) != len(parsed.adapter):
        raise ValueError(
            f"--weights: got {len(weights)} for {len(parsed.adapter)} --adapter, wanted one each"
        )
    if parsed.adapter and parsed.base is not None:
        raise ValueError("--adapter puts adapters on a model, --base extracts one; give either")
    return tuple(zip(parsed.adapter, weights, strict=True))


def _export(parsed: argparse.Namespace) -> None:
    from jaxalign.parallel import distributed
    from jaxalign.run.export_as import ExportOptions, check_out, export

    options = ExportOptions(
        formats=tuple(parsed.to or ("hf",)),
        step=parsed.step,
        best=parsed.best,
        part=parsed.part,
        dtype=parsed.dtype,
        gguf_dtype=parsed.gguf_dtype,
        verify=parsed.verify is not False,
        transformers=parsed.verify is True,
        record=parsed.to is not None or parsed.verify is True,
        adapters=_weighted(parsed),
        base=parsed.base,
        rank=parsed.rank,
        public=parsed.push is not None,
        dequantize=parsed.dequantize,
    )
    check_out(parsed.out, options, [parsed.folder], overwrite=parsed.overwrite)
    with distributed.session():
        if parsed.push is not None:
            _check_push(parsed)
        done = export(parsed.folder, parsed.out, options)
        print("\n".join(done.tables))
        # A plain export prints the table and its path, which scripts may parse.
        checks = sys.stdout if options.record else sys.stderr
        if distributed.is_main():
            print("\n".join(done.checks), file=checks, flush=True)
        what = f"checkpoint {done.step} of {parsed.folder}" if done.step else parsed.folder
        print(f"{what} → {parsed.out}")
        if parsed.push is not None:
            _push(parsed, done)


def _check_push(parsed: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    from jaxalign.commands.push import check_repository
    from jaxalign.parallel import distributed

    with distributed.fail_together("asking the hub"):
        if distributed.is_main():
            check_repository(parsed.push, overwrite=parsed.overwrite, api=HfApi())


def _push(parsed: argparse.Namespace, done: Written) -> None:
    from huggingface_hub import HfApi

    from jaxalign.commands.model_card import model_card
    from jaxalign.commands.push import files_to_push, push
    from jaxalign.parallel import distributed

    with distributed.fail_together("uploading to the hub"):
        if distributed.is_main():
            card = model_card(
                parsed.push, parsed.folder, done.notes, step=done.step, scorer=done.scorer
            )
            files = files_to_push(done.places, done.names)
            address = push(parsed.push, files, card, public=parsed.public, api=HfApi())
            print(f"{parsed.out} → {address}")


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
        "export",
        "write a run's checkpoint, or a model, for Hugging Face, llama.cpp or Orbax",
        _export_arguments,
        _export,
        compiles=True,
    ),
    Command(
        "import",
        "write a model as an Orbax folder, which loads without conversion",
        _import_arguments,
        _import,
    ),
)
