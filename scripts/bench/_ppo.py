"""What a side-by-side run of PPO or of generation consists of: needs numpy only, for every peer.

`_ppo_ours.py` and `_ppo_trl.py` carry a `Rollouts` out, as `_ours.py` and `_trl.py` do a `Job`, and
leave `steps.jsonl` (step, seconds, tokens written) and `done.json`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

PAD, STOP, FIRST = 0, 1, 2
"""Ids: padding, the end of an answer, and the first of all others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Iterations of PPO or GRPO (float32, AdamW, one mini-batch), or calls of generation.

    Attributes:
      what: "ppo", "grpo" or "generate".
      policy: folder in Hugging Face form, also the reference.
      scorer: the same of a reward model, also the start of the critic; PPO only.
      shape: vocabulary, hidden, layers, heads, width of the MLP.
      vocab: ids are drawn from FIRST to this.
      prompts: rows; GRPO: each prompt is in `samples` adjacent rows.
      samples: answers to each prompt; GRPO only.
      prompt_length: tokens of each prompt.
      new_tokens: the longest answer.
      lengths: of the answers of each iteration; each side makes an answer end at its length, and
        nowhere else.
      passes: over `lengths`; in the first of them jaxalign compiles, so it is not measured.
      epochs: of PPO's updates.
      pack: ours: see `ppo.minibatches`.
      row_group: ours: rows computed at a time in an update; 0: `cached_rows`.
      threads: for the peer; XLA takes what the process may use.
    """

    what: str
    policy: str
    scorer: str = ""
    vocab: int
    shape: tuple[int, int, int, int, int]
    prompts: int = 16
    samples: int = 1
    prompt_length: int = 64
    new_tokens: int
    lengths: list[list[int]]
    passes: int = 3
    epochs: int = 4
    pack: int = 0
    row_group: int = 0
    threads: int = 2

    @property
    def steps(self) -> list[list[int]]:
        """The lengths of every step, in order."""
        return self.lengths * self.passes

    def prompt_ids(self) -> np.ndarray:
        """Random prompts, the same in every step: `[B, P]`."""
        shape = (self.prompts // self.samples, self.prompt_length)
        ids = np.random.default_rng(1).integers(FIRST, self.vocab, shape).astype(np.int32)
        return ids.repeat(self.samples, axis=0)


def draw_lengths(kind: str, draws: int, prompts: int, longest: int, shortest: int = 4):
    """Lengths of answers: all the longest ("full"), or uniform from the shortest to it."""
    rng = np.random.default_rng(0)
    low = longest if kind == "full" else shortest
    return rng.integers(low, longest + 1, (draws, prompts)).tolist()


def read_rollouts(folder: str | pathlib.Path) -> Rollouts:
    """Reads `job.json`."""
    return Rollouts(**json.loads((pathlib.Path(folder) / "job.json").read_text()))
