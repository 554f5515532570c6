"""`--adapter`: named adapters on one base, for the commands `generate`, `chat` and `score`."""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxalign.hf.named_adapters import Loaded

_NAMED = re.compile(r"(?P<name>[\w-]+)=(?P<source>.+)")


def adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[NAME=]ADAPTER",
        help="an adapter on the model: PEFT's folder, hub id or .gguf file; several share it",
    )


def named_adapters(texts: Sequence[str] | None) -> dict[str, str]:
    """Name → adapter, from the values of `--adapter`; the default name is the folder's.

    Raises:
      ValueError: a duplicate name, or the base's name.
    """
    from jaxalign.hf.named_adapters import BASE

    found: dict[str, str] = {}
    for text in texts or ():
        named = None if pathlib.Path(text).exists() else _NAMED.fullmatch(text)
        source = text if named is None else named["source"]
        path = pathlib.Path(source).expanduser()
        name = named["name"] if named else (path.stem if path.is_file() else path.resolve().name)
        if name == BASE or name in found:
            why = "the model without adapter" if name == BASE else found[name]
            raise ValueError(
                f"--adapter {text}: {name!r} is {why}; give another name: --adapter NAME={source}"
            )
        found[name] = source
    return found


def load_writers(
    source: str, texts: Sequence[str] | None, option: str, *, with_base: bool = False
) -> dict[str, Loaded]:
    """Loads the language models that answer: one per adapter, or the model itself without any.

    Args:
      source: the model.
      texts: of `--adapter`.
      option: the user's name for `source`, for messages.
      with_base: whether to include the model itself, last, besides its adapters.

    Raises:
      ValueError: a reward model, or as `load_with_adapters`.
    """
    from jaxalign.hf.load import expect_language_model
    from jaxalign.hf.named_adapters import BASE, load_with_adapters

    adapters = named_adapters(texts)
    loaded = load_with_adapters(source, adapters)
    expect_language_model(loaded[BASE].model, source, option)
    for name, folder in adapters.items():
        expect_language_model(loaded[name].model, folder, "--adapter")
    if adapters and not with_base:
        del loaded[BASE]
    return loaded
