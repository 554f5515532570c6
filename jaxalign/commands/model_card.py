"""A model card in Markdown from a run's folder: data, settings, curves and figures."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jaxalign.commands.fetch import data_of, may_be_on_the_hub
from jaxalign.commands.report.charts import thin
from jaxalign.commands.report.metrics import Curve, read_metrics
from jaxalign.data.remote import fetch, is_address
from jaxalign.run.config.runs import RUNS, load_config
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.reporter import SHOWN

_COLUMNS, _ROWS = 6, 12
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)


def model_card(
    name: str, source: str, formats: Mapping[str, Mapping[str, Any]], *, step: int, scorer: bool
) -> str:
    """The text of `README.md` of a repository.

    The card is public, so local paths are cut to their last part and server addresses left out.

    Args:
      name: the repository, `owner/name`.
      source: the run's folder, or the model that was converted.
      formats: format → its entry in `export.json`.
      step: the checkpoint's step; 0 for a model.
      scorer: whether it is a reward model or critic.
    """
    folder = _folder(source)
    run = folder / "config.yaml"
    values = read_yaml(run) if folder.is_dir() and run.is_file() else {}
    algorithm = next((word for word in RUNS if word in values), None)
    config = None if algorithm is None else load_config(algorithm, values)
    base = source if config is None else config.model.source
    data = [] if config is None else list(dict.fromkeys(where for _, where in data_of(config)))
    library = "peft" if set(formats) <= {"peft", "gguf-lora"} else "transformers"
    parts = [_front(base, data, algorithm, library, scorer=scorer), f"# {name.rpartition('/')[2]}"]
    made = f"Trained by `jaxalign {algorithm}`" if algorithm else "Written by `jaxalign export`"
    at = f", {step} steps" if step else ""
    parts.append(f"{made} from {_public(base)}{at}.")
    parts.append(_files(formats))
    if config is not None:
        rows = [(option, _public(where)) for option, where in data_of(config)]
        parts.append("## Data\n\n" + _table(("option", "source"), rows))
        parts.append(_results(folder))
        text = yaml.safe_dump(_public_values(values), sort_keys=False, allow_unicode=True)
        parts.append(f"## Settings\n\n```yaml\n{text.strip()}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _folder(source: str) -> pathlib.Path:
    """A run's folder, or a local copy of the files that the card needs, from a bucket."""
    if is_address(source):
        return fetch(source, "folder", ("config.yaml", "metrics.jsonl"))
    return pathlib.Path(source).expanduser()


def _front(
    base: str, data: Sequence[str], algorithm: str | None, library: str, *, scorer: bool
) -> str:
    """The metadata header for the hub."""
    facts: dict[str, Any] = {"library_name": library}
    facts["pipeline_tag"] = "text-classification" if scorer else "text-generation"
    facts["tags"] = ["jaxalign", *([algorithm] if algorithm else [])]
    if may_be_on_the_hub(base):
        facts["base_model"] = base.partition("@")[0]
    hub = [where.partition(":")[0] for where in data if may_be_on_the_hub(where)]
    if hub:
        facts["datasets"] = list(dict.fromkeys(hub))
    return f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---"


def _files(formats: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, note in formats.items():
        weights = " + ".join(f"{count:,} {kind}" for kind, count in note["weights"].items())
        for reader, found in note.get("verified", {"–": {}}).items():
            apart = (
                f"{found['largest']:.3g} {note['unit']}" if "largest" in found else "not measured"
            )
            rows.append((name, weights, reader, apart))
    heads = ("format", "weights", "read by", "largest difference to the trainer")
    return "## Files\n\n" + _table(heads, rows)


def _results(folder: pathlib.Path) -> str:
    """Held-out metrics before and after, and the curves as a table of some steps."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return ""
    curves = read_metrics(path).curves
    parts = []
    held_out = {n.removeprefix("eval/"): c for n, c in curves.items() if n.startswith("eval/")}
    if held_out:
        rows = []
        for name, curve in held_out.items():
            (first, before), (last, after) = curve[0], curve[-1]
            start = f"{before:.4g}" if first == 0 else "not measured"
            rows.append((name, start, f"{after:.4g}", f"{last:g}"))
        parts.append("## Figures\n\nHeld out:\n\n" + _table(("", "before", "after", "step"), rows))
    names = [name for name in (*SHOWN, "grad_norm") if name in curves][:_COLUMNS]
    if names:
        parts.append("## Curves\n\n" + _curve_table({name: curves[name] for name in names}))
    return "\n\n".join(parts)


def _curve_table(curves: Mapping[str, Curve]) -> str:
    """Some steps of the curves, including their extremes."""
    shown = [step for step, _ in thin(next(iter(curves.values())), _ROWS)]
    by_step = {name: dict(curve) for name, curve in curves.items()}
    rows = [
        (f"{step:g}", *(f"{c[step]:.4g}" if step in c else "" for c in by_step.values()))
        for step in shown
    ]
    return _table(("step", *curves), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines
    )


def _public(text: str) -> str:
    """A source without local folders and addresses, for the public."""
    text = _ADDRESS.sub("(an address)", text)
    path = os.path.expanduser(text)
    if os.path.isabs(path) or pathlib.Path(path).exists():
        return os.path.basename(os.path.normpath(path))
    return text


def _public_values(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _public_values(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_public_values(value) for value in values]
    return _public(values) if isinstance(values, str) and "\n" not in values else values
