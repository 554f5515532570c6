"""`jaxalign data`: shows what a run would train on, on the terminal or as a page.

Everything comes from the batches that training would get, so it shows exactly what is trained. Of
the model only the tokenizer is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.commands.report.charts import bar_chart, nice_step, text
from jaxalign.commands.report.page import page, table
from jaxalign.data import Batches
from jaxalign.run.config.runs import RUNS, algorithm_of, load_config
from jaxalign.run.config.yaml import override, read_yaml
from jaxalign.run.tasks import load_data
from jaxalign.types import PairBatch, PromptBatch, SharedPairBatch, TokenBatch

OPEN, CLOSE = "⟦", "⟧"
"""What stands around trained text where there is no colour."""

_COLOUR, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_BARS, _BAR = 12, 40


class Document(NamedTuple):
    """A sequence of tokens as it stands in a batch.

    Attributes:
      name: "chosen" or "rejected" of a pair, "" otherwise.
      ids: `[n]`.
      trained: bool `[n]`, which tokens are trained as targets.
    """

    name: str
    ids: np.ndarray
    trained: np.ndarray


class Shown(NamedTuple):
    """A document as consecutive pieces: (text, whether it is trained)."""

    name: str
    pieces: list[tuple[str, bool]]


class View(NamedTuple):
    """A summary of one set of data.

    Attributes:
      title: the data and its algorithm.
      summary: what was read, truncated and dropped.
      sources: source → its counts, from `Batches.stats`.
      lengths: tokens of every document looked at.
      examples: the first that training sees: the documents of each.
    """

    title: str
    summary: str
    sources: dict[str, dict[str, Any]]
    lengths: list[int]
    examples: list[list[Shown]]


def inspect_data(
    source: str | pathlib.Path | Mapping[str, Any],
    assignments: Sequence[str] = (),
    algorithm: str | None = None,
    examples: int = 3,
    most: int | None = None,
) -> list[View]:
    """Reads a run's data, training and held out.

    Args:
      source: YAML of sft, reward, dpo or ppo.
      assignments: `key=value` overrides.
      algorithm: which of these; None: the one whose section the YAML has.
      examples: how many examples to show of each.
      most: how many batches to read of each; None: one whole pass.

    Raises:
      ValueError: a wrong configuration or wrong data, or no known algorithm.
    """
    if examples < 0:
        raise ValueError(f"examples={examples}: wanted 0 or more")
    if most is not None and most < 1:
        raise ValueError(f"batches={most}: wanted 1 or more")
    values = override(source if isinstance(source, Mapping) else read_yaml(source), assignments)
    if algorithm is None:
        algorithm = algorithm_of(values, f"give --as {'|'.join(RUNS)}")
    config = load_config(algorithm, values)
    # One pass, however many the run would make.
    data = dataclasses.replace(config.data, epochs=1)
    once = dataclasses.replace(config.run, epochs=None)
    config = dataclasses.replace(config, data=data, run=once)
    with contextlib.redirect_stdout(io.StringIO()):  # it is in the summary
        tok, train, held_out = load_data(config)
        views = [_view(f"training data of {algorithm}", train, tok, examples, most)]
        if held_out is not None:
            views.append(_view(f"held-out data of {algorithm}", held_out, tok, examples, most))
    return views


def _view(title: str, batches: Batches[Any], tok: Any, examples: int, most: int | None) -> View:
    lengths: list[int] = []
    shown: list[list[Shown]] = []
    for batch in itertools.islice(batches, most):
        for documents in groups_of(batch):
            lengths += [len(document.ids) for document in documents]
            if len(shown) < examples:
                shown.append([Shown(d.name, pieces_of(tok, d)) for d in documents])
    counts = batches.stats["sources"]
    lines = batches.describe().splitlines()
    batches.close()
    # Its counts of each source are in a table of their own here.
    counted = tuple(f"  {name}: " for name in counts)
    usage = [f"  {line}" for line in batches.usage]
    summary = [line for line in lines if line in usage or not line.startswith(counted)]
    return View(title, "\n".join(summary), counts, lengths, shown)


def groups_of(batch: Any) -> Iterator[list[Document]]:
    """The documents of a batch of any kind; those that belong together (a pair) in one list."""
    if isinstance(batch, PromptBatch):
        for ids, mask in zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True):
            if mask.any():
                yield [Document("", ids[mask], np.zeros(int(mask.sum()), np.bool_))]
    elif isinstance(batch, PairBatch):
        pairs = zip(_documents(batch.chosen), _documents(batch.rejected), strict=True)
        for (_, *chosen), (_, *rejected) in pairs:
            yield [Document("chosen", *chosen), Document("rejected", *rejected)]
    elif isinstance(batch, SharedPairBatch):
        for branches, ids, trained in _documents(batch.tokens):
            sides = [(branches == 0) | (branches == side) for side in (1, 2)]
            yield [
                Document(name, ids[side], trained[side])
                for name, side in zip(("chosen", "rejected"), sides, strict=True)
            ]
    else:
        tokens = next(part for part in (batch, *batch) if isinstance(part, TokenBatch))
        for _, ids, trained in _documents(tokens):
            yield [Document("", ids, trained)]


def _documents(batch: TokenBatch) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(branches, ids, trained) of every segment of every row, in order.

    `loss_mask` tells whether a target (the next token) is trained; a branch's last token has no
    target.
    """
    width = np.shape(batch.inputs)[-1]
    inputs, segments, masks = (
        np.asarray(leaf).reshape(-1, width)
        for leaf in (batch.inputs, batch.segment_ids, batch.loss_mask)
    )
    given = np.zeros_like(inputs) if batch.branch_ids is None else batch.branch_ids
    for row, branches in enumerate(np.asarray(given).reshape(-1, width)):
        for segment in range(1, int(segments[row].max(initial=0)) + 1):
            here = segments[row] == segment
            of_branch = branches[here]
            trained = np.zeros(len(of_branch), np.bool_)
            trained[1:] = masks[row][here][:-1]
            yield of_branch, inputs[row][here], trained


def pieces_of(tok: Any, document: Document) -> list[tuple[str, bool]]:
    """The text of a document in pieces, each trained or not; special tokens are shown."""
    ids, trained = document.ids, document.trained
    borders = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    # Some tokenizers decode a piece differently alone, so take what it adds to the text before it.
    texts = [_decode(tok, ids[:end]) for end in borders]
    pieces = []
    for start, end, before, after in zip(
        borders[:-1], borders[1:], texts[:-1], texts[1:], strict=True
    ):
        added = after[len(before) :] if after.startswith(before) else _decode(tok, ids[start:end])
        pieces.append((added, bool(trained[start])))
    return pieces


def _decode(tok: Any, ids: np.ndarray) -> str:
    return str(
        tok.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def histogram(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Bins of equal, round width as (first, last), and the count in each."""
    if not lengths:
        return [], []
    width = max(1, round(nice_step(max(lengths) - min(lengths) + 1, _BARS)))
    first = min(lengths) // width
    counts = [0] * (max(lengths) // width + 1 - first)
    for length in lengths:
        counts[length // width - first] += 1
    return [((first + n) * width, (first + n + 1) * width - 1) for n in range(len(counts))], counts


def _length_summary(lengths: Sequence[int]) -> str:
    middle = float(np.median(lengths))
    return f"{len(lengths)} documents, {min(lengths)} to {max(lengths)} tokens, median {middle:g}"


_COLUMNS = ("read", "kept", "dropped", "cut", "tokens", "trained")


def _source_rows(view: View) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of the table of sources."""

    def cell(value: Any) -> str:
        return f"{sum(value.values()) if isinstance(value, Mapping) else value:,}"

    rows = [[source, *(cell(c[name]) for name in _COLUMNS)] for source, c in view.sources.items()]
    return ["source", *_COLUMNS], rows


def show(view: View, colour: bool) -> str:
    """A view as text for a terminal; with `colour` trained text is green, else in ⟦ ⟧."""
    heads, rows = _source_rows(view)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [view.title, "", printable(view.summary), ""]
    for first, *rest in [heads, *rows]:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([printable(first).ljust(widths[0]), *cells]))
    if view.lengths:
        lines += ["", f"Lengths: {_length_summary(view.lengths)}"]
        bins, counts = histogram(view.lengths)
        size = len(str(bins[-1][1]))
        for (low, high), count in zip(bins, counts, strict=True):
            bar = "█" * -(-count * _BAR // max(counts))
            lines.append(f"  {low:>{size}}–{high:<{size}} {bar} {count}".rstrip())
    if view.examples:
        key = f"{_COLOUR}in colour{_PLAIN}" if colour else f"in {OPEN} {CLOSE}"
        lines += ["", f"Examples, what is trained {key}:"]
    for number, documents in enumerate(view.examples, start=1):
        for document in documents:
            lines.append(f"--- {number}{f' {document.name}' if document.name else ''}")
            lines.append(marked(document.pieces, colour))
    return "\n".join([*lines, ""])


def marked(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    """Pieces of text with the trained ones marked."""
    parts = []
    for piece, trained in pieces:
        shown = printable(piece)
        if trained and colour:
            # Line by line, because pagers reset colours at the end of a line.
            shown = "\n".join(f"{_COLOUR}{line}{_PLAIN}" for line in shown.split("\n"))
        elif trained:
            shown = f"{OPEN}{shown}{CLOSE}"
        parts.append(shown)
    return "".join(parts)


def printable(value: str) -> str:
    """Text with escaped control characters, so that data cannot control a terminal."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in value
    )


def write_page(views: Sequence[View], out: str | os.PathLike[str]) -> pathlib.Path:
    """Writes views as one self-contained page; returns the file."""
    body = []
    for view in views:
        heads, rows = _source_rows(view)
        body += [f"<h2>{text(view.title)}</h2>", f"<pre>{text(view.summary)}</pre>"]
        body.append(table(heads, rows, numbers=range(1, len(heads))))
        if view.lengths:
            bins, counts = histogram(view.lengths)
            edges = [float(low) for low, _ in bins] + [bins[-1][1] + 1.0]
            svg = bar_chart(edges, [counts], "lengths of documents", "tokens", "documents")
            lengths = f"Lengths <span>{text(_length_summary(view.lengths))}</span>"
            figure = f"<figure><figcaption>{lengths}</figcaption>{svg}</figure>"
            body.append(f'<div class="charts">{figure}</div>')
        if view.examples:
            body.append("<h3>Examples <mark>what is trained</mark></h3>")
        for number, documents in enumerate(view.examples, start=1):
            for document in documents:
                name = f" {document.name}" if document.name else ""
                body.append(f'<p class="note">{number}{text(name)}</p>')
                inner = "".join(
                    f"<mark>{text(piece)}</mark>" if trained else text(piece)
                    for piece, trained in document.pieces
                )
                body.append(f'<pre class="doc">{inner}</pre>')
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page("Data", body), encoding="utf-8")
    return path
