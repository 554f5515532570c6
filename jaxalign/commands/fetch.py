"""The command `fetch`: downloads a run's hub files once, before many hosts need them."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxalign.commands.algorithms import load_any_config
from jaxalign.commands.command import Command, config_arguments
from jaxalign.parallel.platforms import leave_accelerators_alone


def _arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(
        parser, "YAML file or recipe:NAME; an algorithm's name, or pipeline, may stand before it"
    )


def _fetch(parsed: argparse.Namespace) -> None:
    leave_accelerators_alone()

    from jaxalign.data.sources import fetch_rows
    from jaxalign.hf.load import fetch_model
    from jaxalign.hf.tokenizer import load_tokenizer

    for option, source in _unique(models_of(config) for config in _configs(parsed)):
        if not may_be_on_the_hub(source):
            print(f"{option}: {source} is no hub id; left alone")
            continue
        load_tokenizer(source)
        if not option.endswith("tokenizer"):
            print(f"{option}: {source} → {fetch_model(source)}")
    for option, source in _unique(data_of(config) for config in _configs(parsed)):
        if not may_be_on_the_hub(source):
            print(f"{option}: {source} is no hub id; left alone")
            continue
        fetch_rows(source)
        print(f"{option}: {source} → the cache of datasets")


def _configs(parsed: argparse.Namespace) -> list[Any]:
    """The configuration of the run, or of each stage of a pipeline."""
    if parsed.config != "pipeline":
        return [load_any_config(parsed)[1]]
    from jaxalign.run.pipeline import load_stages

    if not parsed.overrides:
        raise ValueError("fetch pipeline: wanted a YAML file behind it")
    path, *overrides = parsed.overrides
    return [config for _, config in load_stages(path, overrides)]


def models_of(config: Any) -> Iterator[tuple[str, str]]:
    """(option, source) of every model and tokenizer that a run loads."""
    yield "model.source", config.model.source
    if config.model.tokenizer is not None:
        yield "model.tokenizer", config.model.tokenizer
    for option in ("reference", "critic"):
        source = getattr(config, option, None)
        if source not in (None, "policy"):
            yield option, source
    for spec in config.reward_specs() if hasattr(config, "reward_specs") else ():
        if hasattr(spec, "source"):
            yield "reward_model", spec.source


def data_of(config: Any) -> Iterator[tuple[str, str]]:
    """(option, source) of all data that a run reads."""
    for section, (data, _) in config.text_sections.items():
        for option in ("train", "eval"):
            for source in getattr(data, option):
                where = source if isinstance(source, str) else source.where
                yield f"{section}.{option}", where


def _unique(found: Iterator[Iterator[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Each source once, under the first option that names it."""
    once: dict[str, str] = {}
    for pairs in found:
        for option, source in pairs:
            once.setdefault(source, option)
    return [(option, source) for source, option in once.items()]


def may_be_on_the_hub(source: str) -> bool:
    """Whether a source looks like `owner/name` and is not a local path."""
    name = source.partition(":")[0].partition("@")[0]
    path = pathlib.Path(source).expanduser()
    return name.count("/") == 1 and not path.exists() and not os.path.isabs(name)


COMMAND = Command(
    "fetch",
    "download the models and data that a run reads, so that its hosts need no network",
    _arguments,
    _fetch,
)
