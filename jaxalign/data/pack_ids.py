"""Batches from token ids, for research code that tokenizes its own data.

    batches, counts = ja.pack_tokens(input_ids, labels=labels, rows=8, length=512)
    batches, counts = ja.pack_pairs(chosen, rejected, prompts=prompts, rows=8, length=512)

Ids may be ragged lists, or rectangular arrays with an `attention_mask`, padded on either side.
`jaxalign.data.packing` shows the layout of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data.packing import best_fit, token_rows
from jaxalign.types import PairBatch, TokenBatch

IGNORED = -100
"""The label of a token that is not trained, as in transformers."""

Lists = Sequence[Any] | np.ndarray


class PackCounts(NamedTuple):
    """Counts of the documents (or pairs).

    Attributes:
      given: documents passed in.
      kept: documents that are in a batch.
      cut: kept documents that lost their end because they are longer than a row.
      dropped: documents without a trained token, possibly because of truncation. given = kept +
        dropped.
      tokens: kept tokens, without padding; for pairs, of both sides.
      trained: trained tokens among these.
      rows: rows with documents, before empty rows fill up the last batch.
    """

    given: int
    kept: int
    cut: int
    dropped: int
    tokens: int
    trained: int
    rows: int


class _Document(NamedTuple):
    """Tokens `[n]`, which of them are trained, and the weight of each."""

    ids: np.ndarray
    trained: np.ndarray
    weights: np.ndarray


def pack_tokens(
    input_ids: Lists,
    attention_mask: Lists | None = None,
    labels: Lists | None = None,
    *,
    trained: Lists | None = None,
    weights: Lists | None = None,
    rows: int | None = None,
    length: int,
    packing: bool = True,
    pad_id: int = 0,
) -> tuple[list[TokenBatch], PackCounts]:
    """Documents of token ids as batches for SFT.

    Args:
      input_ids: N documents: lists of ids, or an array `[N, n]`.
      attention_mask: the same shape, 0 on padding, which is removed; None: no padding.
      labels: the same shape, not shifted: a token's own id where it is trained, −100 elsewhere.
      trained: alternative to `labels`: True where a token is trained. Without either, all tokens
        are. A document's first token is never a target.
      weights: the weight of each token as a target, ≥ 0, the same shape; or one number per
        document.
      rows: B of each batch; empty rows fill up the last one. None: one batch for all.
      length: T. A longer document loses its end.
      packing: put several documents in a row (best fit); False: one per row.
      pad_id: the id on padding. Masks do not depend on it.

    Returns:
      (batches of numpy arrays `[rows, length]`, `PackCounts`). What was cut or dropped is also
      printed.

    Raises:
      ValueError: shapes that differ, labels that are other tokens, ids that are not integers, or no
        document left.
    """
    _check_shape(rows, length)
    documents = _documents(
        "", input_ids, attention_mask, labels, trained, weights if _is_nested(weights) else None
    )
    if weights is not None and not _is_nested(weights):
        each = _numbers("weights", weights, len(documents))
        documents = [
            document._replace(weights=np.full(len(document.ids), weight, np.float32))
            for document, weight in zip(documents, each, strict=True)
        ]
    kept = [i for i, document in enumerate(documents) if document.trained[1:length].any()]
    ready = {i: _Document(*(part[:length] for part in documents[i])) for i in kept}
    groups = _groups({i: len(ready[i].ids) for i in kept}, length, packing)
    counts = _counts("documents", documents, [ready], length, len(groups))
    members = _batched(groups, rows)
    batches = [
        _token_batch(ready, part, size, length, pad_id, weights is not None)
        for part, size in members
    ]
    return batches, counts


def pack_pairs(
    chosen: Lists | Mapping[str, Lists],
    rejected: Lists | Mapping[str, Lists],
    prompts: Lists | None = None,
    *,
    weights: Lists | None = None,
    margins: Lists | None = None,
    rows: int | None = None,
    length: int,
    packing: bool = False,
    pad_id: int = 0,
) -> tuple[list[PairBatch], PackCounts]:
    """Pairs of answers, as token ids, as batches for DPO and reward models.

    Args:
      chosen: N preferred answers: lists of ids, all trained; or a mapping with `input_ids`,
        `labels` and, for arrays, `attention_mask`, as for `pack_tokens`: prompts with answers.
      rejected: N rejected answers, in the same form.
      prompts: N lists of ids that precede both answers; None with mappings.
      weights: the weight of each pair, `[N]`, ≥ 0.
      margins: how much better the chosen answer is, `[N]`, for the reward loss with margin.
      rows: B of each batch; empty rows fill up the last one. None: one batch for all.
      length: T. A longer side loses its end; a pair without a trained token on either side is
        dropped.
      packing: put several pairs in a row; a pair has the same row and segment on both sides.
      pad_id: the id on padding.

    Returns:
      (batches of numpy arrays, `PackCounts`). What was cut or dropped is also printed.

    Raises:
      ValueError: as for `pack_tokens`; different numbers of chosen and rejected answers; or a
        missing prompt.
    """
    _check_shape(rows, length)
    sides = [_side(*named, prompts) for named in (("chosen", chosen), ("rejected", rejected))]
    total = len(sides[0])
    if len(sides[1]) != total:
        raise ValueError(f"chosen has {total} answers, rejected {len(sides[1])}: wanted pairs")
    numbers = {
        name: None if given is None else _numbers(name, given, total, negative=name == "margins")
        for name, given in (("weights", weights), ("margins", margins))
    }
    kept = [i for i in range(total) if all(side[i].trained[1:length].any() for side in sides)]
    ready = [{i: _Document(*(x[:length] for x in side[i])) for i in kept} for side in sides]
    groups = _groups({i: max(len(side[i].ids) for side in ready) for i in kept}, length, packing)
    counts = _counts("pairs", sides[0], ready, length, len(groups), sides[1])
    slots = max(len(group) for group in groups)
    batches = []
    for part, size in _batched(groups, rows):
        left, right = (_token_batch(side, part, size, length, pad_id, False) for side in ready)
        per_pair = {
            name: None if values is None else _per_pair(values, part, size, slots, packing)
            for name, values in numbers.items()
        }
        mask = _per_pair(np.ones(total, bool), part, size, slots, packing) if packing else None
        batches.append(
            PairBatch(
                left, right, margin=per_pair["margins"], mask=mask, weights=per_pair["weights"]
            )
        )
    return batches, counts


def _side(name: str, given: Any, prompts: Lists | None) -> list[_Document]:
    """The prompts joined with one side's answers."""
    if isinstance(given, Mapping):
        known = {"input_ids", "attention_mask", "labels"}
        unknown = sorted(set(given) - known)
        if unknown or prompts is not None or "labels" not in given or "input_ids" not in given:
            raise ValueError(
                f"{name}: got a mapping with {', '.join(map(str, given)) or 'nothing'}"
                f"{' beside prompts' if prompts is not None else ''}; wanted input_ids, labels "
                "(−100 on the prompt) and perhaps attention_mask, and no prompts"
            )
        values = [given.get(key) for key in ("input_ids", "attention_mask", "labels")]
        return _documents(f"{name}.", values[0], values[1], values[2], None, None)
    if prompts is None:
        raise ValueError(
            f"{name}: got ids and no prompts; wanted prompts=…, or a mapping with input_ids and "
            "labels that tell the answer from its prompt"
        )
    answers, starts = _int_lists(name, given), _int_lists("prompts", prompts)
    if len(answers) != len(starts):
        raise ValueError(f"{name}: got {len(answers)} answers for {len(starts)} prompts")
    return [
        _Document(
            np.concatenate([start, answer]),
            np.arange(len(start) + len(answer)) >= len(start),
            np.ones(len(start) + len(answer), np.float32),
        )
        for start, answer in zip(starts, answers, strict=True)
    ]


def _documents(
    prefix: str, input_ids: Any, attention_mask: Any, labels: Any, trained: Any, weights: Any
) -> list[_Document]:
    if labels is not None and trained is not None:
        raise ValueError(f"{prefix}labels and {prefix}trained: got both, wanted one of them")
    ids = _int_lists(f"{prefix}input_ids", input_ids)
    beside = {"attention_mask": attention_mask, "labels": labels, "trained": trained,
              "weights": weights}  # fmt: skip
    columns = {
        name: _aligned(f"{prefix}{name}", values, ids)
        for name, values in beside.items()
        if values is not None
    }
    documents = []
    for number, row in enumerate(ids):
        own = {name: column[number] for name, column in columns.items()}
        flags = own.get("trained", np.ones(len(row), bool)).astype(bool)
        if "labels" in own:
            flags = own["labels"] != IGNORED
            other = np.flatnonzero(flags & (own["labels"] != row))
            if other.size:
                at = other[0]
                raise ValueError(
                    f"{prefix}labels[{number}][{at}]: got {own['labels'][at]} beside the token "
                    f"{row[at]}; wanted −100, or the token itself: labels are not shifted"
                )
        factors = own.get("weights", np.ones(len(row))).astype(np.float32)
        if not (np.isfinite(factors).all() and (factors >= 0).all()):
            raise ValueError(f"{prefix}weights[{number}]: wanted finite numbers of 0 or more")
        real = own.get("attention_mask", np.ones(len(row))) != 0
        documents.append(_Document(row[real], flags[real], factors[real]))
    return documents


def _int_lists(name: str, given: Any) -> list[np.ndarray]:
    """Lists of ids as int32 arrays."""
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__"):
        raise ValueError(f"{name}: got {type(given).__name__}, wanted lists of token ids")
    found = []
    for number, row in enumerate(given):
        ids = np.asarray(row)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(
                f"{name}[{number}]: got {ids.dtype} {ids.shape}, wanted a list of integers"
            )
        if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
            raise ValueError(f"{name}[{number}]: got {ids.min()} to {ids.max()}, wanted ids ≥ 0")
        found.append(ids.astype(np.int32))
    return found


def _aligned(name: str, given: Any, ids: list[np.ndarray]) -> list[np.ndarray]:
    """Values aligned with the ids, one list per document."""
    if len(given) != len(ids):
        raise ValueError(f"{name}: got {len(given)} lists for {len(ids)} documents")
    found = [np.asarray(row) for row in given]
    for number, (row, own) in enumerate(zip(found, ids, strict=True)):
        if row.shape != own.shape:
            raise ValueError(f"{name}[{number}]: got shape {row.shape}, wanted {own.shape}")
    return found


def _numbers(name: str, given: Any, count: int, *, negative: bool = False) -> np.ndarray:
    values = np.asarray(given, np.float32)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ValueError(f"{name}: got shape {values.shape}, wanted {count} finite numbers")
    if not negative and (values < 0).any():
        raise ValueError(f"{name}: got {values.min()}, wanted 0 or more")
    return values


def _is_nested(values: Any) -> bool:
    return values is not None and len(values) > 0 and np.ndim(values[0]) > 0


def _check_shape(rows: int | None, length: int) -> None:
    if length < 2 or (rows is not None and rows < 1):
        raise ValueError(f"rows={rows}, length={length}: wanted 1 or more rows of 2 or more tokens")


def _groups(sizes: dict[int, int], length: int, packing: bool) -> list[list[int]]:
    if not sizes:
        raise ValueError(
            f"no trained token is left in any document at length={length}; check labels, or use a "
            "larger length"
        )
    numbers = list(sizes)
    if not packing:
        return [[number] for number in numbers]
    rows = best_fit(list(sizes.values()), length)
    return [[numbers[i] for i in row] for row in rows]


def _batched(groups: list[list[int]], rows: int | None) -> Iterator[tuple[list[list[int]], int]]:
    size = len(groups) if rows is None else rows
    for start in range(0, len(groups), size):
        yield groups[start : start + size], size


def _counts(
    what: str,
    given: Sequence[_Document],
    ready: Sequence[dict[int, _Document]],
    length: int,
    rows: int,
    others: Sequence[_Document] = (),
) -> PackCounts:
    kept = ready[0].keys()
    sides = (given, others) if others else (given,)
    cut = sum(any(len(side[i].ids) > length for side in sides) for i in kept)
    documents = [document for side in ready for document in side.values()]
    counts = PackCounts(
        given=len(given),
        kept=len(kept),
        cut=cut,
        dropped=len(given) - len(kept),
        tokens=sum(len(document.ids) for document in documents),
        trained=int(sum(document.trained[1:].sum() for document in documents)),
        rows=rows,
    )
    if counts.cut or counts.dropped:
        print(
            f"{counts.given} {what}: {counts.cut} cut to {length} tokens, {counts.dropped} dropped "
            "for want of a trained token"
        )
    return counts


def _token_batch(
    documents: Mapping[int, _Document],
    groups: list[list[int]],
    rows: int,
    length: int,
    pad_id: int,
    weighted: bool,
) -> TokenBatch:
    plain = {i: (documents[i].ids, documents[i].trained) for group in groups for i in group}
    batch = token_rows(plain, groups, rows, length, pad_id)  # pyrefly: ignore[bad-argument-type]
    if not weighted:
        return batch
    weights = np.zeros((rows, length), np.float32)
    for row, group in enumerate(groups):
        start = 0
        for member in group:
            own = documents[member].weights
            weights[row, start : start + len(own) - 1] = own[1:]  # as targets
            start += len(own)
    return batch._replace(weights=weights)


def _per_pair(
    values: np.ndarray, groups: list[list[int]], rows: int, slots: int, packing: bool
) -> np.ndarray:
    """A number for each pair, `[rows]`, or `[rows, slots]` in packed rows."""
    result = np.zeros((rows, slots), values.dtype)
    for row, group in enumerate(groups):
        result[row, : len(group)] = values[group]
    return result if packing else result[:, 0]
