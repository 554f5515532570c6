"""Several runs in sequence from one YAML: each stage starts from an earlier stage's model.

    folder: runs/mine
    defaults: {…}                        # merged under every stage
    stages:
      - {name: sft, algorithm: sft, model: {source: some/model}, …}
      - {name: rm, algorithm: reward, model: {source: "${sft}"}, …}

`${name}` stands for the model folder of an earlier stage, `${examples}` for the example data that
the package ships. Everything else in a stage is the run's own configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxalign.data.remote import is_address
from jaxalign.parallel import distributed
from jaxalign.run.config.runs import RUNS, load_config
from jaxalign.run.config.yaml import merge, override, read_yaml
from jaxalign.run.folder import has_checkpoints
from jaxalign.run.loop import Result, train
from jaxalign.run.remote import below, check_folder, has_remote_checkpoints

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")

EXAMPLES = pathlib.Path(__file__).parents[1] / "commands" / "quickstart" / "example_data"


def load_stages(
    source: str | pathlib.Path | Mapping[str, Any],
    assignments: Sequence[str] = (),
    language: str = "en",
) -> list[tuple[str, Any]]:
    """The checked configurations of a pipeline, in order, before anything runs.

    Args:
      source: YAML file or nested values.
      assignments: `key=value` overrides for a stage by its name (`sft.data.rows=8`), for all stages
        (`defaults.run.seed=1`), or for `folder`.
      language: the language of the example data that `${examples}` names.

    Returns:
      (name, configuration) of each stage.

    Raises:
      ValueError: unknown keys, stages without name or algorithm, a placeholder that names no
        earlier stage, or an invalid configuration; the message names the stage.
    """
    values = dict(source) if isinstance(source, Mapping) else read_yaml(source)
    stages = values.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError("pipeline: wanted a list under 'stages'")
    names = [stage.get("name") if isinstance(stage, Mapping) else None for stage in stages]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name or name in ("defaults", "folder", "examples"):
            raise ValueError(f"pipeline: stages[{number}] wants a name of its own, got {name!r}")
        if name in names[:number]:
            raise ValueError(f"pipeline: two stages are called {name!r}")
    plain: dict[str, Any] = {}
    plain |= {"folder": values.get("folder"), "defaults": values.get("defaults", {})}
    unknown = set(values) - {"folder", "defaults", "stages"}
    if unknown:
        raise ValueError(
            f"pipeline: unknown keys {sorted(unknown)}; known: folder, defaults, stages"
        )
    plain |= {stage["name"]: {k: v for k, v in stage.items() if k != "name"} for stage in stages}
    for assignment in assignments:
        if assignment.split("=")[0].split(".")[0] not in plain:
            raise ValueError(
                f"override {assignment!r}: starts with no stage; "
                f"known: {', '.join(plain)}, e.g. {names[0]}.data.rows=8"
            )
    plain = override(plain, assignments)
    for name in ("defaults", *map(str, names)):
        plain[name] = {} if plain[name] is None else plain[name]
        if not isinstance(plain[name], dict):
            raise ValueError(f"pipeline: {name}={plain[name]!r}: wanted a section")
    target = plain["folder"]
    if not isinstance(target, str):
        raise ValueError(f"pipeline: folder={target!r}: wanted the folder to write to")
    folder = check_folder(target, "folder")
    known = {"examples": str(EXAMPLES / language)}
    loaded: list[tuple[str, Any]] = []
    for name in map(str, names):
        stage = merge(plain["defaults"], plain[name])
        algorithm = stage.pop("algorithm", None)
        if algorithm not in RUNS:
            raise ValueError(
                f"pipeline stage {name!r}: algorithm={algorithm!r}, wanted one of {', '.join(RUNS)}"
            )
        stage = merge(stage, {"run": {"folder": below(folder, name)}})
        try:
            loaded.append((name, load_config(algorithm, _fill(stage, known))))
        except ValueError as error:
            raise ValueError(f"pipeline stage {name!r}: {error}") from error
        if loaded[-1][1].run.export:
            known[name] = below(folder, name, "model")
    return loaded


def run_stages(
    stages: Sequence[tuple[str, Any]],
    around: Callable[[Any], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, Result]:
    """Runs the stages in order; returns each one's result by name.

    Args:
      stages: from `load_stages`.
      around: configuration → a context in which its stage runs.
    """
    results: dict[str, Result] = {}
    began = time.monotonic()
    # A stage that was not reached has no checkpoint to resume from.
    reached = any(_has_checkpoints(config.run.folder) for _, config in stages)
    for number, (name, config) in enumerate(stages, start=1):
        if config.run.resume and reached:
            run = dataclasses.replace(config.run, resume="auto")
            config = dataclasses.replace(config, run=run)
        with around(config):
            results[name] = train(config, f"[{number}/{len(stages)}] {name}", began)
        late = results[name].signal
        if late is not None and number < len(stages) and jax.process_count() == 1:
            raise distributed.Preempted(
                f"stopped after the stage {name}, as {late} came; run.resume=true goes on with the "
                "next"
            )
        # The next stage cannot use this stage's arrays and programs.
        gc.collect()
        jax.clear_caches()
    return results


def _has_checkpoints(folder: str) -> bool:
    """Whether a run's folder, local or in a bucket, holds a checkpoint."""
    if is_address(folder):
        return has_remote_checkpoints(folder)
    return has_checkpoints(pathlib.Path(folder))


def _fill(value: Any, known: Mapping[str, str]) -> Any:
    """Replaces `${name}` by folders."""
    if isinstance(value, Mapping):
        return {k: _fill(v, known) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fill(v, known) for v in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ValueError(
                f"{match[0]} names no earlier stage that exports its model; "
                f"known: {', '.join(known)}"
            )
        return known[match[1]]

    return _PLACEHOLDER.sub(put, value)
