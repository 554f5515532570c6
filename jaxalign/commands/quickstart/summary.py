"""The quickstart's summary: figures, win rates, every answer, and what got worse."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.commands.quickstart.forms import shares, without_courtesies
from jaxalign.commands.quickstart.judge import Judge, Rate, win_rate
from jaxalign.commands.report.runs import write_report
from jaxalign.run.loop import Result

MODELS = ("base", "sft", "ppo", "dpo")
_CONTESTS = (("ppo", "sft"), ("dpo", "sft"), ("ppo", "dpo"))
_FIGURES = (
    ("sft", "loss/nll", "SFT loss (nats a token)"),
    ("reward", "accuracy", "reward model: pairs ranked right"),
    ("ppo", "objective/scores", "PPO: mean reward-model score"),
    ("ppo", "objective/kl", "PPO: KL from the SFT model (nats an answer)"),
)
_ITERATION = (
    "objective/scores",
    "objective/scores_std",
    "objective/kl",
    "kl_coef",
    "judge/score",
    "response/length",
)


class Told(NamedTuple):
    """The inputs of the summary.

    Attributes:
      model: the initial model.
      language: the language of the example data.
      prompts: held-out prompts, N.
      answers: model → N answers.
      results: stage → the result of its run.
      judge: the judge.
      scores: model → the judge's scores of its answers, `[N]`.
      tokens: model → tokens of each answer.
      stopped: why PPO ended early, or "".
    """

    model: str
    language: str
    prompts: list[str]
    answers: dict[str, list[str]]
    results: dict[str, Result]
    judge: Judge
    scores: dict[str, np.ndarray]
    tokens: dict[str, list[int]]
    stopped: str


def summarize(told: Told) -> dict[str, Any]:
    """The summary, JSON-able."""
    sft = told.answers["sft"]
    forms = {name: shares(told.prompts, given, sft) for name, given in told.answers.items()}
    length = {name: float(np.mean(counts)) for name, counts in told.tokens.items()}
    content = {name: _content_words(given) for name, given in told.answers.items()}
    wins = {f"{a}_vs_{b}": win_rate(told.scores[a], told.scores[b]) for a, b in _CONTESTS}
    ppo = told.results["ppo"]
    return {
        "model": told.model,
        "language": told.language,
        "figures": _figures(told.results),
        "judge": {
            "accuracy": told.judge.accuracy._asdict(),
            "by_kind": {k: list(v) for k, v in told.judge.by_kind.items()},
        },
        "win_rates": {name: rate._asdict() for name, rate in wins.items()},
        "forms": forms,
        "kl": ppo.after.get("objective/kl", ppo.history[-1]["objective/kl"]),
        "length": length,
        "worse": what_got_worse(forms, content, wins),
        "ppo": _iterations(ppo),
        "ppo_stopped": told.stopped,
        "answers": [
            {"prompt": prompt} | {name: told.answers[name][i].strip() for name in MODELS}
            for i, prompt in enumerate(told.prompts)
        ],
    }


def what_got_worse(
    forms: Mapping[str, Mapping[str, float]],
    content: Mapping[str, float],
    wins: Mapping[str, Rate],
) -> list[str]:
    """One sentence per metric that is worse than after SFT, and per metric that was not measured.

    Args:
      forms: model → `forms.shares`.
      content: model → mean number of words per answer outside courtesies.
      wins: `<model>_vs_sft` → the judge's verdict.
    """
    found = []
    for name in ("ppo", "dpo"):
        label, form, before = name.upper(), forms[name], forms["sft"]
        if form["answers"] < before["answers"]:
            found.append(
                f"{label}: {form['answers']:.0%} of the answers still answer, after SFT "
                f"{before['answers']:.0%}."
            )
        if form["repeats"] > before["repeats"]:
            found.append(
                f"{label}: {form['repeats']:.0%} of the answers say a sentence twice, after SFT "
                f"{before['repeats']:.0%}."
            )
        if content[name] < content["sft"]:
            found.append(
                f"{label}: without its courtesies an answer has {content[name]:.1f} words, after "
                f"SFT {content['sft']:.1f}."
            )
        lost = 1 - wins[f"{name}_vs_sft"].share
        if lost > 0:
            found.append(f"{label}: in {lost:.0%} of the prompts the judge prefers the SFT answer.")
    return [
        *found,
        "Nothing here measures whether an answer is true; small models are often wrong.",
    ]


def write_summary(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes `summary.json`, `summary.md` and `report.html`, and prints the second."""
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    page = make_page(summary)
    (folder / "summary.md").write_text(page, encoding="utf-8")
    report = write_report(folder)
    print("\n" + page)
    print(f"written to {folder / 'summary.json'}, {folder / 'summary.md'}, {report}")
    command = "jaxalign" if shutil.which("jaxalign") else f"{sys.executable} -m jaxalign"
    print(f"talk to the model: {command} chat {folder / 'ppo' / 'model'}")


def _content_words(answers: Sequence[str]) -> float:
    kept = [" ".join(without_courtesies(answer)) for answer in answers]
    return float(np.mean([len(text.split()) for text in kept]))


def _figures(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Held-out metrics; before PPO those of its first answers, which the SFT model gave."""
    found = []
    for stage, name, title in _FIGURES:
        result = results[stage]
        if name not in result.after:
            continue  # a stage may have no held-out data
        before = result.before.get(name)
        if before is None and stage == "ppo":
            before = result.history[0][name]
        found.append(
            {"stage": stage, "figure": title, "before": before, "after": result.after[name]}
        )
    return found


def _iterations(result: Result) -> list[dict[str, float]]:
    return [
        {"iteration": i} | {name: row[name] for name in _ITERATION if name in row}
        for i, row in enumerate(result.history, start=1)
    ]


def make_page(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    accuracy = Rate(**summary["judge"]["accuracy"])
    lines = [
        f"# Quickstart from {pathlib.Path(summary['model']).name}",
        "",
        "Held-out figures, before and after each stage:",
        "",
        "| figure | before | after |",
        "| --- | ---: | ---: |",
        *(
            f"| {f['figure']} | {_number(f['before'])} | {_number(f['after'])} |"
            for f in summary["figures"]
        ),
        "",
        f"The judge ranks {_percent(accuracy)} of {accuracy.count} held-out pairs right. It "
        f"prefers, over {len(summary['answers'])} held-out prompts:",
        "",
        "| contest | share won | 95 % interval |",
        "| --- | ---: | ---: |",
        *(
            f"| {name.replace('_vs_', ' against ')} | {w['share']:.0%} "
            f"| {w['low']:.0%} to {w['high']:.0%} |"
            for name, w in summary["win_rates"].items()
        ),
        "",
        "| model | warm | still answers | repeats a sentence | tokens |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {f['warm']:.0%} | {f['answers']:.0%} | {f['repeats']:.0%} "
            f"| {summary['length'][name]:.1f} |"
            for name, f in summary["forms"].items()
        ),
        "",
        "What got worse: " + " ".join(summary["worse"]),
        "",
        "PPO by iteration, on the training prompts"
        + (f"; it ended early, since {summary['ppo_stopped']}" if summary["ppo_stopped"] else "")
        + ":",
        "",
        "| iteration | mean score | std | KL | β | judge | answer tokens |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            "| " + " | ".join(_cell(row.get(name)) for name in ("iteration", *_ITERATION)) + " |"
            for row in summary["ppo"]
        ),
        "",
        "Answers to held-out prompts (greedy):",
        "",
    ]
    for row in summary["answers"]:
        lines += [f"**{row['prompt']}**", ""]
        lines += [f"- {name}: {row[name]}" for name in row if name != "prompt"]
        lines.append("")
    times = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    busy, peak = summary["cpu_seconds"]["total"], summary["peak_gib"]
    lines.append(f"Seconds: {times}; processor seconds {busy:.0f}; peak memory {peak:.1f} GiB.")
    return "\n".join([*lines, ""])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _percent(rate: Rate) -> str:
    return f"{rate.share:.0%} (95 % interval {rate.low:.0%} to {rate.high:.0%})"
