"""Sampled answers over time, each token coloured by log-ratio, KL, reward, advantage or value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.commands.report.axes import short, text
from jaxalign.commands.report.curves import swatch
from jaxalign.commands.report.load import Run

_DUMPS = 6  # iterations shown of a run
_ANSWERS = 3  # of an iteration
_LONGEST = 300  # tokens of an answer
_TOKENS = 6000  # on the page: a token takes about 120 bytes of it
_PROMPT = 600  # characters
_LEVELS = 4  # shades on either side of zero


class Measure(NamedTuple):
    """A quantity by which tokens are coloured.

    Attributes:
      letter: of the classes of its shades.
      name: for people.
      signed: whether it has shades on both sides of zero.
    """

    letter: str
    name: str
    signed: bool


MEASURES = {
    "kl": Measure("l", "log-ratio", True),
    "kl3": Measure("k", "KL", False),
    "rewards": Measure("r", "reward", True),
    "advantages": Measure("a", "advantage", True),
    "values": Measure("v", "value", True),
}
"""In `rollouts.jsonl`, `kl` is log π − log π_ref of a token, its log-ratio. The KL shown is the k3
estimate of it, exp(−r) − 1 + r, which is never negative."""


def samples_section(runs: Sequence[Run]) -> str:
    """The sampled answers of all runs that recorded some; "" if none did."""
    shown = [run for run in runs if run.rollouts]
    if not shown:
        return ""
    note = (
        "Tokens as the policy sampled them; the stronger the colour, the larger the value. Point "
        "at a token for its values. Log-ratio: log π − log π_ref, blue where the policy likes a "
        "token more than the reference does, orange where less. KL: its k3 estimate. Reward: with "
        "the KL penalty, if that is in the reward."
    )
    budget = _TOKENS // len(shown)
    parts = [_run(run, budget, several=len(runs) > 1) for run in shown]
    return f'<h3>Samples over time</h3><p class="note">{text(note)}</p>{"".join(parts)}'


def _run(run: Run, budget: int, several: bool) -> str:
    steps = sorted({row["step"] for row in run.rollouts})
    chosen = [steps[round(i * (len(steps) - 1) / (_DUMPS - 1))] for i in range(_DUMPS)]
    rows = [
        row
        for step in sorted(set(chosen))
        for row in [row for row in run.rollouts if row["step"] == step][:_ANSWERS]
    ]
    answers = [answer for answer in map(_read, rows) if answer is not None]
    longest = min(_LONGEST, budget // max(1, len(answers)))
    measures = [key for key in MEASURES if all(key in answer.values for answer in answers)]
    if not answers or not measures:
        return f'<p class="note">{text(run.name)}: its samples cannot be read.</p>'
    scales = {key: _scale([v for a in answers for v in a.values[key]]) for key in measures}
    cards, head = [], "h5" if several else "h4"
    for step in dict.fromkeys(answer.step for answer in answers):
        inner = "".join(_card(a, scales, longest) for a in answers if a.step == step)
        cards.append(f"<{head}>{text(run.across.capitalize())} {step}</{head}>{inner}")
    columns = "".join(f"<section>{card}</section>" for card in cards)
    title = f"<h4>{swatch(run.number)}{text(run.name)}</h4>" if several else ""
    choices = "".join(
        f'<label><input type="radio" name="by{run.number}" value="{MEASURES[key].letter}"{on}/>'
        f"{MEASURES[key].name}</label>"
        for key, on in zip(measures, [' checked="checked"', *[""] * len(measures)], strict=False)
    )
    return (
        f'<div class="samples" data-run="{run.number}">{title}'
        f"<fieldset><legend>Colour tokens by</legend>{choices}{_key()}</fieldset>"
        f'<div class="cards">{columns}</div></div>'
    )


def _key() -> str:
    """The scale of the colours."""
    shades = "".join(f'<i class="n{n}"></i>' for n in range(_LEVELS, 0, -1))
    shades += "<i></i>" + "".join(f'<i class="p{n}"></i>' for n in range(1, _LEVELS + 1))
    return f'<span class="scale" aria-hidden="true">less {shades} more</span>'


class _Answer(NamedTuple):
    step: int
    prompt: str
    score: float
    finished: bool
    trained: bool
    tokens: list[str]
    values: dict[str, list[float]]


def _read(row: Mapping[str, Any]) -> _Answer | None:
    """An answer; None if the line is not as a run writes it."""
    try:
        tokens = [str(token) for token in row["tokens"]]
        values = {}
        for key in ("kl", "rewards", "advantages", "values"):
            if key in row:
                values[key] = [float(value) for value in row[key]]
        if "kl" in values:
            values["kl3"] = [_k3(value) for value in values["kl"]]
        if not tokens or any(len(column) != len(tokens) for column in values.values()):
            return None
        flags = (bool(row.get("finished", True)), bool(row.get("trained", True)))
        return _Answer(row["step"], str(row["prompt"]), float(row["score"]), *flags, tokens, values)
    except (LookupError, TypeError, ValueError):
        return None


def _k3(ratio: float) -> float:
    return math.exp(min(-ratio, 30.0)) - 1 + ratio


def _scale(values: Sequence[float]) -> float:
    """The magnitude of the strongest shade: 95 % of tokens are below it."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0


def _card(answer: _Answer, scales: Mapping[str, float], longest: int) -> str:
    prompt = answer.prompt[-_PROMPT:]
    prompt = f"… {prompt}" if len(answer.prompt) > _PROMPT else prompt
    facts = [f"score {short(answer.score)}", f"{len(answer.tokens)} tokens"]
    facts += [] if answer.finished else ["cut off: no stop token"]
    facts += [] if answer.trained else ["not in the loss"]
    shown = "".join(
        _token(answer, place, scales) for place in range(min(longest, len(answer.tokens)))
    )
    left = len(answer.tokens) - longest
    more = f' <span class="note">… {left} more tokens</span>' if left > 0 else ""
    return (
        f'<article><p class="prompt">{text(prompt)}</p><p class="tokens">{shown}{more}</p>'
        f'<p class="facts">{text(" · ".join(facts))}</p></article>'
    )


def _token(answer: _Answer, place: int, scales: Mapping[str, float]) -> str:
    classes, tips = [], []
    for key, scale in scales.items():
        value, measure = answer.values[key][place], MEASURES[key]
        tips.append(f"{measure.name} {short(value, 3)}")
        level = _level(value, scale)
        if level > 0 or (level < 0 and measure.signed):
            classes.append(f"{measure.letter}{'p' if level > 0 else 'n'}{abs(level)}")
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return f'<span{kind} title="{text(", ".join(tips))}">{text(answer.tokens[place])}</span>'


def _level(value: float, scale: float) -> int:
    """−4 … 4: the shade of a value; 0 for negligible values."""
    if not scale > 0 or math.isnan(value):
        return 0
    share = max(-1.0, min(1.0, value / scale))
    return round(_LEVELS * share)
