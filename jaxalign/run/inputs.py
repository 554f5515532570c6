"""A run's inputs besides its options: the contents of models, data, tokenizer and template.

The digests are kept in the run's folder, so that a resumed run can detect changes. Weights that are
in every checkpoint are not included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxalign.data.chat import resolve_chat_template
from jaxalign.data.day import written_day
from jaxalign.run.config.base import Run
from jaxalign.run.config.data import DataConfig
from jaxalign.run.config.eval_tasks import EvalTask
from jaxalign.run.digests import (
    data_digest,
    file_digest,
    shape_digest,
    text_digest,
    tokenizer_digest,
    weights_digest,
)

DAY = "day that the template writes"
"""The name of this input."""


def file_inputs(config: Run) -> dict[str, str]:
    """Option → digest of the files that it names, before anything is loaded.

    A missing file or a hub id has no digest; loading reports missing files.
    """
    once = functools.cache(weights_digest)  # several options may name the same model
    jobs: dict[str, Callable[[], str | None]] = {
        name: functools.partial(once, source) for name, source in config.frozen_models.items()
    }
    # For a model whose weights are in the checkpoint, only the shape is an input.
    jobs.setdefault("model.source", lambda: shape_digest(config.model.source))
    for name, path, section in _data_paths(config):
        jobs[name] = functools.partial(data_digest, path, whole=not section.streaming)
    for number, spec in enumerate(getattr(config, "rewards", ())):
        file = str(getattr(spec, "path", "")).rpartition(":")[0]
        if file.endswith(".py"):
            jobs[f"rewards[{number}].path"] = functools.partial(file_digest, file)
    found = {}
    for name, digest in jobs.items():
        with contextlib.suppress(ValueError, OSError):
            found[name] = digest()
    return {name: digest for name, digest in found.items() if digest is not None}


def text_inputs(config: Run, tok: Any) -> dict[str, str]:
    """Tokenizer and chat template, and the date if the template writes it."""
    found = {}
    if hasattr(tok, "backend_tokenizer"):
        found["tokenizer"] = tokenizer_digest(tok)
    with contextlib.suppress(ValueError):  # plain texts need no template
        template = resolve_chat_template(tok, config.model.chat_template)
        found["chat_template"] = text_digest(template)
        day = written_day(template)
        if day is not None:
            found[DAY] = day.isoformat()
    return found


def recorded_day(inputs: Mapping[str, str]) -> datetime.date:
    """The day that a run's template writes since its first start; today if there is none."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return datetime.date.fromisoformat(inputs[DAY])
    return datetime.date.today()


def source_paths(config: Run) -> list[str]:
    """Everything a run reads that could be a local path."""
    models = [config.model.source, config.model.tokenizer, config.model.chat_template]
    models += [getattr(config, name, None) for name in ("reference", "critic", "reward_model")]
    named = [name for name in models if isinstance(name, str)]
    named += config.frozen_models.values()
    tasks = [task for task in config.run.eval_tasks if isinstance(task, EvalTask)]
    named += [file for task in tasks for file in task.files]
    return named + [path for _, path, _ in _data_paths(config)]


def _data_paths(config: Run) -> Iterator[tuple[str, str, DataConfig]]:
    """(option, path, its section) of every source of data."""
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if isinstance(section, DataConfig):
            for part in ("train", "eval"):
                for number, source in enumerate(getattr(section, part)):
                    path = source if isinstance(source, str) else source.path
                    yield f"{field.name}.{part}[{number}].path", str(path), section
