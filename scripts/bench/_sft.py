"""What a side-by-side run of SFT consists of: needs numpy only, for every peer.

`_sft_ours.py`, `_sft_trl.py` and `_sft_tunix.py` carry a `Texts` out, as `_ours.py` and `_trl.py`
do a `Job`, and leave `steps.jsonl` (step, loss, seconds, tokens) and `done.json`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

LONGEST, SHORTEST, ROWS, BATCHES = 256, 32, 8, 4
"""Tokens of a document, rows of a step, batches of a pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """SFT of random documents, every token trained, float32, AdamW.

    Attributes:
      kind: "full": every document has `LONGEST` tokens; "ragged": `SHORTEST` to `LONGEST`.
      size: name of the shape.
      shape: vocabulary, hidden, layers, heads, width of the MLP.
      model: folder in Hugging Face form, where a side starts from weights.
      passes: over the batches; in the first of them JAX compiles, so it is not measured.
      row_length: ours, ragged: tokens of a packed row; rows × it are the same at all sides.
      row_group: ours: rows computed at a time; 0: `jaxalign.commands.bench.case.cached_rows`.
      threads: for the peers; XLA takes what the process may use.
    """

    kind: str
    size: str
    shape: tuple[int, int, int, int, int]
    model: str
    passes: int = 4
    row_length: int = 512
    row_group: int = 0
    threads: int = 2

    def documents(self) -> list[np.ndarray]:
        """Token ids of each document: so many that packed and padded rows make whole batches."""
        rng = np.random.default_rng(0)
        shortest = LONGEST if self.kind == "full" else SHORTEST
        count = ROWS * BATCHES * (1 if self.kind == "full" else 2)
        lengths = rng.integers(shortest, LONGEST + 1, count)
        return [rng.integers(2, self.shape[0], n).astype(np.int32) for n in lengths]


def read_texts(folder: str | pathlib.Path) -> Texts:
    """Reads `job.json`."""
    values = json.loads((pathlib.Path(folder) / "job.json").read_text())
    return Texts(**values | {"shape": tuple(values["shape"])})
