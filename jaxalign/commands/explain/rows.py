"""The rows of a step with their figures, assembled on the host from its updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.commands.explain.measure import Kind, Measure, Measured
from jaxalign.commands.explain.units import Document, Unit, documents_of, units_of
from jaxalign.run.replay import Watcher
from jaxalign.run.tasks import Built
from jaxalign.types import PromptBatch, RolloutBatch, TrainState

GRADIENT, SHARE = "gradient", "gradient share"
_PER_TOKEN = {
    "advantage": "advantages",
    "reward": "rewards",
    "value": "old_values",
    "return": "returns",
}
"""Name of a token's value → the array of a rollout."""


@dataclasses.dataclass
class Row:
    """A document, a pair or an answer of the step.

    Attributes:
      origin: `file:line`; "" if unknown, as in a stream.
      place: its position, for display.
      figures: name → value; NaN if it has none.
      documents: its texts, as token ids.
    """

    origin: str
    place: str
    figures: dict[str, float]
    documents: list[Document]

    @property
    def name(self) -> str:
        """The row's name in messages."""
        return f"{self.origin} ({self.place})" if self.origin else self.place


class Update(NamedTuple):
    """One update, on the host.

    Attributes:
      batch: its batch, after `prepare`.
      units: the batch's units.
      measured: the measurement; None if the algorithm cannot be measured.
    """

    batch: Any
    units: list[Unit]
    measured: Measured | None


class StepWatcher(Watcher):
    """Stores the batches of a step and measures its updates.

    Args:
      kind: how to measure; None: do not measure.
      mesh: the run's mesh.

    Attributes:
      batches: the batches of data, in order.
      updates: the updates, in order.
      logged: the metrics of each update.
    """

    def __init__(self, kind: Kind | None, mesh: Any):
        self._measure = None if kind is None else Measure(kind, mesh)
        self.kind = kind
        self.batches: list[Any] = []
        self.updates: list[Update] = []
        self.logged: list[dict[str, float]] = []

    def batch(self, batch: Any) -> None:
        """See `Watcher.batch`."""
        self.batches.append(batch)

    def update(self, state: TrainState, part: Any) -> None:
        """See `Watcher.update`."""
        host = jax.device_get(part)
        units = units_of(host)
        measured = None if self._measure is None else self._measure(state, part, units)
        self.updates.append(Update(host, units, measured))

    def metrics(self, logged: Mapping[str, Any]) -> None:
        """See `Watcher.metrics`."""
        self.logged.append({name: float(v) for name, v in jax.device_get(dict(logged)).items()})


def rows_of(watcher: StepWatcher, built: Built, step: int) -> list[Row]:
    """The rows of a step, in the order of the batch.

    Args:
      watcher: the step's watcher.
      built: the run's task.
      step: the step, from 1.
    """
    if not watcher.updates or watcher.kind is None:
        return []
    if isinstance(watcher.updates[0].batch, RolloutBatch):
        rows = _answers(watcher.updates, _prompt_origins(watcher.batches, built))
    else:
        rows = _units(watcher.updates[0], watcher.kind, _origins(built, step))
    total = sum(row.figures[GRADIENT] ** 2 for row in rows)
    for row in rows:
        row.figures[SHARE] = row.figures[GRADIENT] ** 2 / total if total > 0 else 0.0
    return rows


def _origins(built: Built, step: int) -> list[str]:
    batches = built.task.batches
    return [_origin(batches.examples, row) for row in batches.rows_of(step - 1)]


def _origin(examples: Sequence[Any], row: int) -> str:
    found = getattr(examples[row], "origin", "") if 0 <= row < len(examples) else ""
    return str(found or "")


def _units(update: Update, kind: Kind, origins: list[str]) -> list[Row]:
    measured = update.measured
    assert measured is not None
    several = len({row for row, _ in update.units}) < len(update.units)
    known = len(origins) == len(update.units)
    rows = []
    for number, unit in enumerate(update.units):
        documents = documents_of(
            update.batch, unit, measured.tokens, measured.values, targets=kind.language
        )
        place = f"row {unit[0] + 1}" + (f", document {unit[1]}" if several else "")
        figures = {name: float(value[number]) for name, value in measured.figures.items()}
        if not kind.by_row:
            figures["loss"] = _mean_loss(documents, update, unit)
        rows.append(Row(origins[number] if known else "", place, figures, documents))
        figures |= _counts(documents)
    return rows


def _mean_loss(documents: Iterable[Document], update: Update, unit: Unit) -> float:
    """The mean over a document's trained tokens, weighted where tokens have weights."""
    (document,) = documents
    losses, weights = document.values["loss"], getattr(update.batch, "weights", None)
    known = ~np.isnan(losses)
    if not known.any():
        return np.nan
    if weights is None:
        return float(losses[known].mean())
    here = np.asarray(update.batch.segment_ids)[unit[0]] == unit[1]
    mine = np.asarray(weights, np.float64)[unit[0]][here & update.batch.loss_mask[unit[0]]]
    return float((losses[known] * mine).sum() / mine.sum()) if mine.sum() > 0 else np.nan


def _counts(documents: Sequence[Document]) -> dict[str, float]:
    """The number of tokens, of trained tokens, and the norm of the gradient over all tokens."""
    squares = sum(np.nansum(np.square(document.values[GRADIENT])) for document in documents)
    return {
        "tokens": float(sum(len(document.ids) for document in documents)),
        "trained": float(sum(np.sum(document.trained) for document in documents)),
        GRADIENT: float(np.sqrt(squares)),
    }


# PPO: an answer is in one update of every pass over the rollout.


def _prompt_origins(batches: Iterable[Any], built: Built) -> dict[bytes, str]:
    """The ids of a prompt → its row of the data."""
    found = {}
    for batch in batches:
        if isinstance(batch, PromptBatch):
            rows = zip(*(np.asarray(leaf) for leaf in batch), strict=True)
            for ids, mask, index in rows:
                found[_key(ids[mask])] = _origin(built.task.batches.examples, int(index))
    return found


def _key(ids: np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, np.int32).tobytes()


def _answers(updates: Sequence[Update], origins: Mapping[bytes, str]) -> list[Row]:
    """The answers of a rollout, with the values before each answer's last update."""
    rows: dict[tuple[bytes, int], Row] = {}
    for update in updates:
        seen: dict[bytes, int] = {}
        for unit in update.units:
            fresh = _answer(update, unit)
            key = _key(fresh.documents[0].ids)
            seen[key] = seen.get(key, 0) + 1  # two answers of an update may be the same
            before = rows.setdefault((key, seen[key]), fresh)
            if before is not fresh:
                _merge(before, fresh)
    for number, row in enumerate(rows.values(), start=1):
        document = row.documents[0]
        first = int(np.argmax(~np.isnan(document.values["kl"])))
        row.origin = origins.get(_key(document.ids[:first]), "")
        row.place = f"answer {number}"
    return list(rows.values())


def _merge(row: Row, later: Row) -> None:
    """Adds a later update of the same answer."""
    for name in ("gradient", "log_ratio"):
        row.documents[0].values[name] = later.documents[0].values[name]
    values = row.documents[0].values
    values["clipped"] = np.fmax(values["clipped"], later.documents[0].values["clipped"])
    figures = row.figures
    figures["clipped"] = float(np.nansum(values["clipped"]))
    figures["largest ratio"] = max(figures["largest ratio"], later.figures["largest ratio"])
    figures[GRADIENT] = later.figures[GRADIENT]
    figures["updates"] += 1


def _answer(update: Update, unit: Unit) -> Row:
    batch, measured = update.batch, update.measured
    assert measured is not None
    mask = batch.tokens.loss_mask if batch.answer_mask is None else batch.answer_mask
    inside = np.asarray(mask, bool)
    arrays = {name: getattr(batch, field) for name, field in _PER_TOKEN.items()}
    arrays["kl"] = batch.old_logprobs - batch.ref_logprobs
    # An answer that is left out of the loss also has a KL and rewards.
    whole = measured.tokens._replace(loss_mask=inside)
    values = {
        name: np.where(inside, np.asarray(value), np.nan)
        for name, value in (arrays | measured.values).items()
        if value is not None and name != "loss"
    }
    (document,) = documents_of(batch, unit, whole, values, targets=True)
    (learned,) = documents_of(batch, unit, measured.tokens, {}, targets=True)
    document = document._replace(trained=learned.trained)
    columns = document.values
    figures = {
        "reward": float(np.nansum(columns.get("reward", np.zeros(1)))),
        "kl": float(np.nansum(columns["kl"])),
        "advantage": _mean(columns["advantage"]),
        "largest ratio": float(np.exp(min(_largest(columns["log_ratio"]), 20.0))),
        "clipped": float(np.nansum(columns["clipped"])),
        "length": float(np.sum(~np.isnan(columns["kl"]))),
        "updates": 1.0,
    }
    figures = _scores(batch, unit[0]) | figures | _counts([document])
    return Row("", "", figures, [document])


def _scores(batch: RolloutBatch, row: int) -> dict[str, float]:
    """An answer's score and its parts; {} if answers share rows."""
    if batch.scores is None:
        return {}
    found = {"score": float(np.asarray(batch.scores)[row])}
    for name, part in (batch.reward_parts or {}).items():
        applies = part.applies is None or bool(np.asarray(part.applies)[row])
        found[f"score/{name}"] = float(np.asarray(part.values)[row]) if applies else np.nan
    return found


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _largest(values: np.ndarray) -> float:
    known = np.abs(values[~np.isnan(values)])
    return float(known.max()) if known.size else 0.0
