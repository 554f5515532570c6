"""A quickstart's summary in HTML: metrics, win rates, all answers with changed words marked."""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxalign.commands.report.axes import text
from jaxalign.commands.report.page import scrolling, table
from jaxalign.hf.source import read_json

_BEFORE = {"sft": "base", "ppo": "sft", "dpo": "sft"}
"""Model → the one that it was trained from, whose answers its own are compared with."""


def summary_sections(path: pathlib.Path, several: bool = False) -> str:
    """The sections of `summary.json`.

    Args:
      path: the file.
      several: whether the page also shows other folders, so that labels must name the folder.

    Raises:
      ValueError: it is not what `jaxalign quickstart` writes.
    """
    summary = read_json(path)
    try:
        of = f" of the stages of {path.parent.name}" if several else ""
        sections = [_figures(summary, of)]
        if "win_rates" in summary:
            sections.append(_contests(summary, of))
        return "".join([*sections, _answers(summary, of)])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not a summary as `jaxalign quickstart` writes it") from error


def changed_words(before: str, after: str) -> list[tuple[str, bool]]:
    """Pieces of `after`, in order, with whether they are new compared with `before`.

    A piece is a run of words with the spaces between; a Chinese character counts as a word.
    """
    old, new = _words(before), _words(after)
    pieces: list[tuple[str, bool]] = []
    # No autojunk, because these texts are short.
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        if start < end:
            pieces.append(("".join(new[start:end]), kind != "equal"))
    return pieces


def _words(line: str) -> list[str]:
    """Words with the space after them, so that joined they are the line again."""
    return re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+\s*|\s+", line)


def _figures(summary: Mapping[str, Any], of: str) -> str:
    rows = [
        (f["figure"], "not measured" if f["before"] is None else f"{f['before']:.3f}",
         f"{f['after']:.3f}")
        for f in summary["figures"]
    ]  # fmt: skip
    made = table(("figure", "before", "after"), rows, numbers=(1, 2))
    return f"<h2>Held-out figures</h2>{scrolling(made, f'held-out figures{of}')}"


def _contests(summary: Mapping[str, Any], of: str) -> str:
    accuracy = summary["judge"]["accuracy"]
    contests = [
        (
            name.replace("_vs_", " against "),
            f"{w['share']:.0%}",
            f"{w['low']:.0%} to {w['high']:.0%}",
        )
        for name, w in summary["win_rates"].items()
    ]
    forms = [
        (name, *(f"{form[key]:.0%}" for key in ("warm", "answers", "repeats")),
         f"{summary['length'][name]:.1f}")
        for name, form in summary["forms"].items()
    ]  # fmt: skip
    won = table(("contest", "won", "95 % interval"), contests, numbers=(1, 2))
    heads = ("model", "warm", "still answers", "repeats a sentence", "tokens")
    made = table(heads, forms, numbers=(1, 2, 3, 4))
    return (
        f'<p class="note">The judge ranks {accuracy["share"]:.0%} of {accuracy["count"]} held-out '
        f"pairs right; PPO is {summary['kl']:.1f} nats an answer from the SFT model.</p>"
        f"<h2>Contests</h2>{scrolling(won, f'contests{of}')}"
        f"<h2>Forms of the answers</h2>{scrolling(made, f'forms of the answers{of}')}"
        f"<p>What got worse: {text(' '.join(summary['worse']))}</p>"
    )


def _answers(summary: Mapping[str, Any], of: str) -> str:
    names = list(summary["answers"][0])
    heads = "".join(f"<th>{text(name)}</th>" for name in names)
    rows = []
    for row in summary["answers"]:
        cells = [
            f'<td class="a">{_marked(row[_BEFORE[name]], row[name])}</td>'
            if _BEFORE.get(name) in row
            else f'<td class="a">{text(row[name])}</td>'
            for name in names
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<h2>Answers to held-out prompts</h2><p class="note">Marked: words that are not in the '
        "answer of the model that training started from.</p>"
        + scrolling(f"<table><tr>{heads}</tr>{''.join(rows)}</table>", f"answers{of}")
    )


def _marked(before: str, after: str) -> str:
    return "".join(
        f"<mark>{text(piece)}</mark>" if new else text(piece)
        for piece, new in changed_words(before, after)
    )
