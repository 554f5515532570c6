"""Samples of rollouts, token by token, and histograms, as JSONL in a run's folder."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import numpy as np

from jaxalign.algorithms.ppo.rows import answer_mask_of, without_lower_states
from jaxalign.data.bounds import parse_json
from jaxalign.parallel import distributed
from jaxalign.parallel.sharding import all_gather_rows
from jaxalign.run.storage import LineFile
from jaxalign.types import RolloutBatch

BINS = 20
SAMPLES, HISTOGRAMS = "rollouts.jsonl", "histograms.jsonl"


class RolloutDump:
    """Writes `rollouts.jsonl` and `histograms.jsonl` every few iterations.

    Args:
      folder: the run's folder.
      tok: the policy's tokenizer.
      every: iterations between two dumps; 0: no dumps.
      samples: answers per dump.
    """

    def __init__(self, folder: str | pathlib.Path, tok: Any, every: int, samples: int):
        self._folder, self._tok = pathlib.Path(folder), tok
        self._every, self._samples = every, samples
        self._begun = False

    def write(self, step: int, rollout: RolloutBatch) -> None:
        """Dumps the rollout of iteration `step`, counted from 1, if a dump is due.

        A resumed run drops earlier dumps of the iterations that it repeats.
        """
        if not self._every:
            return
        main = distributed.is_main()
        if main and not self._begun:
            self._begun = True
            for name in (SAMPLES, HISTOGRAMS):
                _keep_before(self._folder / name, step)
        if (step - 1) % self._every:
            return
        # All hosts gather, one writes.
        rows, counts = sample_rows(rollout, self._tok, self._samples), histograms(rollout)
        if main:
            _append(self._folder / SAMPLES, [{"step": step} | row for row in rows])
            _append(self._folder / HISTOGRAMS, [{"step": step} | counts])


def sample_rows(rollout: RolloutBatch, tok: Any, count: int) -> list[dict[str, Any]]:
    """The first answers of a rollout, with everything computed for each of their tokens.

    Lists are aligned: entry t of `tokens` (text pieces), `ids`, `logprobs`, `ref_logprobs`, `kl`
    (their difference), `rewards`, `advantages`, and with a critic `values` and `returns`, belong
    to the t-th token of the answer. `trained` says whether the answer is in the loss.
    """
    batch: Any = all_gather_rows(without_lower_states(rollout)._replace(ptx=None))
    mask = answer_mask_of(batch)
    result = []
    for row in np.flatnonzero(mask.any(axis=1))[:count]:
        kept = mask[row]
        ids = batch.tokens.targets[row][kept]
        first = int(np.flatnonzero(kept)[0])
        # The answer's first token is the target at `first`.
        prompt = batch.tokens.inputs[row][: first + 1][
            batch.tokens.segment_ids[row][: first + 1] > 0
        ]
        columns = {
            "logprobs": batch.old_logprobs,
            "ref_logprobs": batch.ref_logprobs,
            "kl": batch.old_logprobs - batch.ref_logprobs,
            "rewards": batch.rewards,
            "advantages": batch.advantages,
            "values": batch.old_values,
            "returns": batch.returns,
        }
        result.append(
            {
                "row": int(row),
                "prompt": str(tok.decode(prompt)),
                "answer": str(tok.decode(ids)),
                "score": float(batch.scores[row]),
                "finished": bool(batch.finished[row]),
                "trained": bool(batch.tokens.loss_mask[row].any()),
                "ids": ids.tolist(),
                "tokens": [str(tok.decode([one])) for one in ids],
            }
            | {
                name: [round(float(x), 6) for x in values[row][kept]]
                for name, values in columns.items()
                if values is not None
            }
        )
    return result


def histograms(rollout: RolloutBatch) -> dict[str, Any]:
    """`scores` and `lengths` of all answers: `edges` of the bins, and the `counts` between them."""
    batch: Any = all_gather_rows(without_lower_states(rollout)._replace(ptx=None))
    valid, mask = np.asarray(batch.valid), answer_mask_of(batch)
    result = {}
    for name, values in (("scores", batch.scores), ("lengths", mask.sum(axis=1))):
        counts, edges = np.histogram(np.asarray(values, np.float64)[valid], bins=BINS)
        result[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return result


def _append(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with contextlib.closing(LineFile(path)) as file:
        file.write("".join(lines))


def _keep_before(path: pathlib.Path, step: int) -> None:
    """Drops the lines of iteration `step` and later, and a truncated line."""
    if not path.exists():
        return
    kept = []
    # Split only at "\n": an answer may contain other line separators, such as U+2028.
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if parse_json(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    # Replaced atomically: a run killed here keeps the old file.
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)
