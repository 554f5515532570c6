"""Log-probabilities of a frozen reference, computed once for all data and kept in a folder.

The key of a pair is a hash of its token ids and masks, so that order, packing and the number of
epochs do not matter. Everything else that affects the numbers is in the fingerprint. A cache with
another fingerprint is an error that names the differences.

    folder/fingerprint.json    what the numbers belong to
    folder/logps.npz           keys uint8 [N, 16], chosen float32 [N], rejected float32 [N]
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

from jaxalign.data.bounds import read_json_file
from jaxalign.types import PairBatch, SharedPairBatch, TokenBatch

AnyPairs = TypeVar("AnyPairs", PairBatch, SharedPairBatch)

REMEDY = "give another folder in reference_cache, or delete this one to have it made anew"
"""What to do about a cache that does not fit."""


class ReferenceCache:
    """The log-probabilities of a reference for known pairs.

    Args:
      logps: key of a pair → (chosen, rejected), in nats.
    """

    def __init__(self, logps: dict[bytes, tuple[float, float]] | None = None):
        self.logps = {} if logps is None else logps

    def __len__(self) -> int:
        return len(self.logps)

    def add(self, batches: Iterable[AnyPairs], prepare: Callable[[AnyPairs], AnyPairs]) -> None:
        """Runs the reference over all pairs that are not yet in the cache.

        Args:
          batches: on the host.
          prepare: adds the reference's log-probabilities to a batch.
        """
        for batch in batches:
            keys = pair_keys(batch)
            if all(key is None or key in self.logps for key in keys.flat):
                continue
            done = prepare(batch)
            chosen = np.asarray(done.ref_chosen_logps, np.float32)
            rejected = np.asarray(done.ref_rejected_logps, np.float32)
            for at, key in np.ndenumerate(keys):
                if key is not None:
                    self.logps[key] = float(chosen[at]), float(rejected[at])

    def fill(self, batch: AnyPairs) -> AnyPairs:
        """Adds `ref_chosen_logps` and `ref_rejected_logps` to a batch; 0 where there is no pair.

        Raises:
          ValueError: a pair is not in the cache.
        """
        keys = pair_keys(batch)
        both = np.zeros((2, *keys.shape), np.float32)
        for at, key in np.ndenumerate(keys):
            if key is not None:
                if key not in self.logps:
                    raise ValueError(
                        f"the data holds a pair that is not among the {len(self)} of the reference "
                        f"cache; {REMEDY}"
                    )
                both[(slice(None), *at)] = self.logps[key]
        return batch._replace(ref_chosen_logps=both[0], ref_rejected_logps=both[1])

    def missing(self, batches: Iterable[AnyPairs]) -> int:
        """The number of distinct pairs of the batches that are not in the cache."""
        keys = {key for batch in batches for key in pair_keys(batch).flat}
        return len(keys - {None} - self.logps.keys())

    def save(self, folder: str | os.PathLike[str], fingerprint: dict[str, Any]) -> None:
        """Writes the cache; the fingerprint comes last, so an incomplete write does not count."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer(b"".join(self.logps), np.uint8).reshape(-1, 16)
        values = np.array(list(self.logps.values()), np.float32).reshape(-1, 2)
        arrays = {"keys": keys, "chosen": values[:, 0], "rejected": values[:, 1]}
        with (path / "logps.npz.part").open("wb") as file:
            np.savez(file, **arrays)  # pyrefly: ignore[bad-argument-type]
        (path / "logps.npz.part").replace(path / "logps.npz")
        text = json.dumps(fingerprint, indent=2, ensure_ascii=False) + "\n"
        (path / "fingerprint.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], fingerprint: dict[str, Any]
    ) -> ReferenceCache | None:
        """Reads a cache; None if there is none in the folder.

        Raises:
          ValueError: the fingerprint differs; the message names the parts that differ.
        """
        path = pathlib.Path(folder)
        if not (path / "fingerprint.json").is_file():
            return None
        try:
            there = read_json_file(path / "fingerprint.json")
            if not isinstance(there, dict):
                raise ValueError("fingerprint.json holds no object")
            # Opened here, so that it is closed even if numpy fails.
            with (path / "logps.npz").open("rb") as raw, np.load(raw) as file:
                columns = [file[name] for name in ("keys", "chosen", "rejected")]
            pairs = {k.tobytes(): (float(c), float(r)) for k, c, r in zip(*columns, strict=True)}
        except Exception as error:  # numpy and zipfile raise many types
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"reference cache {path}: unreadable ({what}); {REMEDY}") from error
        wrong = [
            f"{name} (cache {there.get(name)!r}, run {fingerprint.get(name)!r})"
            for name in sorted(there.keys() | fingerprint.keys())
            if there.get(name) != fingerprint.get(name)
        ]
        if wrong:
            raise ValueError(
                f"reference cache {path} belongs to something else: other {'; '.join(wrong)}; "
                f"{REMEDY}"
            )
        return cls(pairs)


def pair_keys(batch: PairBatch | SharedPairBatch) -> np.ndarray:
    """A 16-byte key of each pair, as objects `[B]` or `[B, S]`; None where there is no pair.

    It depends on the token ids and on which are trained, not on their position in the row.
    """
    if isinstance(batch, SharedPairBatch):
        sides = [batch.tokens, batch.tokens]
        branches = [1, 2]
    else:
        sides, branches = [batch.chosen, batch.rejected], [0, 0]
    hosts = [_on_host(side) for side in sides]
    if batch.mask is None:
        chosen, rejected = (np.any(side.loss_mask, axis=1) for side in hosts)
        exists = chosen & rejected
    else:
        exists = np.asarray(batch.mask)
    keys = np.full(exists.shape, None, object)
    for at in np.argwhere(exists):
        row, segment = int(at[0]), int(at[1]) + 1 if len(at) == 2 else None
        digest = hashlib.blake2b(digest_size=16)
        for side, branch in zip(hosts, branches, strict=True):
            digest.update(_document(side, row, segment, branch))
        keys[tuple(at)] = digest.digest()
    return keys


def _on_host(tokens: TokenBatch) -> TokenBatch:
    return jax.tree.map(np.asarray, tokens)


def _document(side: TokenBatch, row: int, segment: int | None, branch: int) -> bytes:
    """The ids of one document up to its last trained token, and which are trained."""
    ids = side.segment_ids[row]
    here = ids > 0 if segment is None else ids == segment
    if branch:
        branches = np.asarray(side.branch_ids)[row]
        here = here & ((branches == 0) | (branches == branch))
    trained = side.loss_mask[row][here]
    end = int(np.flatnonzero(trained)[-1]) + 1
    tokens = np.append(side.inputs[row][here][:end], side.targets[row][here][end - 1])
    return (
        len(tokens).to_bytes(8, "little")
        + tokens.astype("<i4").tobytes()
        + (trained[:end].astype(np.uint8).tobytes())
    )
