"""The quickstart: all four algorithms on the example data, and what each did, side by side."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from jaxalign.data import read_rows
from jaxalign.hf import load_pretrained, load_tokenizer
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.loop import Result
from jaxalign.run.pipeline import EXAMPLES, load_stages, run_stages
from jaxalign.sampling.generate import generate

RECIPE = pathlib.Path(__file__).parent / "recipes" / "quickstart.yaml"

_COMPARED = ("base", "sft", "ppo", "dpo")
_SHOWN_PROMPTS = 5


def quickstart(
    model: str, language: str = "en", out: str = "runs/quickstart", assignments: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the four stages from one model and writes `summary.json` and `summary.md` to `out`.

    Args:
      model: folder, `.gguf` file or hub id of a small chat model.
      language: "en" or "zh", of the example data.
      out: folder to write to; each stage has a sub-folder with its `model/`.
      assignments: overrides such as `ppo.run.steps=4`.

    Returns:
      The summary that was written.
    """
    began = time.perf_counter()
    recipe = read_yaml(RECIPE)
    defaults = recipe["defaults"]
    recipe["folder"] = out
    defaults["model"]["source"] = model
    stages = load_stages(recipe, assignments, language)
    print(f"jaxalign quickstart: {len(stages)} stages from {model}")
    results = run_stages(stages)

    prompts = [row.data["prompt"] for row in read_rows([str(_held_out(language))])]
    prompts = prompts[:_SHOWN_PROMPTS]
    sources = {"base": model} | {
        name: str(results[name].model) for name in _COMPARED if name in results
    }
    print("answers of the models, greedy, to held-out prompts …")
    started = time.perf_counter()
    answers = {name: _answers(source, prompts, stages[0][1]) for name, source in sources.items()}
    summary = {
        "model": model,
        "language": language,
        "figures": _figures(results),
        "ppo": _iterations(results["ppo"]),
        "answers": [
            {"prompt": prompt} | {name: given[i] for name, given in answers.items()}
            for i, prompt in enumerate(prompts)
        ],
        "seconds": {name: round(result.seconds, 1) for name, result in results.items()}
        | {"answers": round(time.perf_counter() - started, 1)},
    }
    summary["seconds"]["total"] = round(time.perf_counter() - began, 1)
    folder = pathlib.Path(out)
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    page = _page(summary)
    (folder / "summary.md").write_text(page, encoding="utf-8")
    print("\n" + page)
    print(f"written to {folder / 'summary.json'}, {folder / 'summary.md'}")
    return summary


def _held_out(language: str) -> pathlib.Path:
    return EXAMPLES / language / "prompts_heldout.jsonl"


def _answers(source: str, prompts: list[str], config: Any) -> list[str]:
    model, params = load_pretrained(source)
    tok = load_tokenizer(source)
    return generate(
        model,
        params,
        tok,
        prompts,
        max_new_tokens=40,
        temperature=0.0,
        chat_template=config.model.chat_template,
    )


_FIGURES = (
    ("sft", "loss/nll", "SFT loss (nats a token)"),
    ("reward", "accuracy", "reward model: pairs ranked right"),
    ("ppo", "objective/scores", "PPO: mean reward-model score"),
    ("ppo", "objective/scores_std", "PPO: standard deviation of these scores"),
    ("ppo", "objective/kl", "PPO: KL from the SFT model (nats an answer)"),
    ("dpo", "rewards/accuracies", "DPO: pairs ranked right"),
    ("dpo", "rewards/margins", "DPO: margin of implicit rewards"),
)


def _figures(results: dict[str, Result]) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "figure": title,
            "before": results[stage].before[name],
            "after": results[stage].after[name],
        }
        for stage, name, title in _FIGURES
        if name in results[stage].after  # a stage may have no held-out data
    ]


def _iterations(result: Result) -> list[dict[str, float]]:
    names = ("objective/scores", "objective/scores_std", "objective/kl", "response/length")
    return [
        {"iteration": i} | {name: row[name] for name in names}
        for i, row in enumerate(result.history, start=1)
    ]


def _page(summary: dict[str, Any]) -> str:
    lines = [
        f"# Quickstart from {pathlib.Path(summary['model']).name}",
        "",
        "Held-out figures, before and after each stage:",
        "",
        "| figure | before | after |",
        "| --- | ---: | ---: |",
        *(f"| {f['figure']} | {f['before']:.3f} | {f['after']:.3f} |" for f in summary["figures"]),
        "",
        "PPO by iteration, on the training prompts:",
        "",
        "| iteration | mean score | std | KL | answer tokens |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['iteration']} | {r['objective/scores']:.3f} | {r['objective/scores_std']:.3f} "
            f"| {r['objective/kl']:.2f} | {r['response/length']:.1f} |"
            for r in summary["ppo"]
        ),
        "",
        "Answers to held-out prompts (greedy):",
        "",
    ]
    for row in summary["answers"]:
        lines += [f"**{row['prompt']}**", ""]
        lines += [f"- {name}: {row[name].strip()}" for name in row if name != "prompt"]
        lines.append("")
    times = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"Seconds: {times}.", ""])
