"""The quickstart: all four algorithms on the example data, with their results side by side."""

from __future__ import annotations

import os
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from jaxalign.commands.quickstart import story
from jaxalign.commands.quickstart.early_stop import EarlyStop
from jaxalign.commands.quickstart.judge import Features, Judge, lower_layers, train_judge
from jaxalign.commands.quickstart.progress import Progress
from jaxalign.commands.quickstart.summary import Told, summarize, write_summary
from jaxalign.data import read_rows
from jaxalign.hf import load_tokenizer, save_pretrained
from jaxalign.models.decoder import Decoder
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.loop import Hooks, Result, train
from jaxalign.run.pipeline import EXAMPLES, load_stages
from jaxalign.run.tasks.loader import KeepingLoader
from jaxalign.sampling.generate import generate

RECIPE = pathlib.Path(__file__).parent / "recipes" / "quickstart.yaml"


def quickstart(
    model: str, language: str = "en", out: str = "runs/quickstart", assignments: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the stages from one model and writes `summary.json`, `summary.md` and `report.html`.

    SFT, then a judge and a reward model on top of it, PPO against the reward model, and DPO from
    the same SFT model. Models pass from stage to stage in memory; each is also written to
    `<stage>/model`.

    Args:
      model: folder, `.gguf` file or hub id of a small chat model.
      language: the language of the example data, "en" or "zh".
      out: folder to make; each stage has a sub-folder with its `model/`.
      assignments: overrides such as `ppo.run.steps=4`.

    Returns:
      The summary that was written.

    Raises:
      ValueError: `out` is not empty, or an override is invalid; raised before anything runs.
    """
    recipe = read_yaml(RECIPE)
    options = recipe.pop("quickstart")
    recipe["folder"] = out
    recipe["defaults"]["model"]["source"] = model
    stages = dict(load_stages(recipe, assignments, language))
    check_new(pathlib.Path(out))
    return _Quickstart(model, language, pathlib.Path(out), stages, options).run()


def check_new(folder: pathlib.Path) -> None:
    """Raises ValueError if the folder is not empty, because it may hold a run."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--out {folder}: there is something in it already, which would be overwritten; give "
            f"another folder, such as --out {folder}-2, or move this one away"
        )


class _Quickstart:
    """One run of the quickstart: the state that its parts share."""

    def __init__(
        self, model: str, language: str, out: pathlib.Path, stages: dict[str, Any],
        options: dict[str, Any],
    ):  # fmt: skip
        self._source, self._out, self._stages, self._options = model, out, stages, options
        self._examples, self._language = EXAMPLES / language, language
        self._progress = Progress(options["seconds"])
        self._loader = KeepingLoader()
        self._tok = load_tokenizer(model)
        self._prompts = [row.data["prompt"] for row in self._rows("prompts_heldout")]
        self._results: dict[str, Result] = {}
        self._answers: dict[str, list[str]] = {}
        self._spent: dict[str, tuple[float, float]] = {}
        self._part: tuple[str, float, float] = ("", 0.0, 0.0)

    def run(self) -> dict[str, Any]:
        """All parts, in order."""
        print(f"jaxalign quickstart: SFT, reward model, PPO and DPO from {self._source}")
        self._begin("base")
        base, params = self._load(self._source)
        self._answer("base", base, params)
        # SFT starts from these very arrays.
        self._loader.keep(self._source, base, params)
        del base, params

        self._train("sft")
        self._loader.forget(self._source)
        self._say(story.sft(self._results["sft"]))
        sft, params = self._load(self._folder("sft"))
        self._answer("sft", sft, params)

        self._begin("judge")
        judge = self._judge(sft, params)
        self._make_lower(sft, params)
        del sft, params
        self._say(story.judge(judge.accuracy))

        self._train("reward", evaluate_first=False)
        self._say(story.reward(self._results["reward"]))

        names = ("most_kl", "aim_kl", "patience")
        limits = {name: self._options[name] for name in names}
        stop = EarlyStop(judge, iterations=self._stages["ppo"].run.steps, **limits)
        self._train("ppo", evaluate_first=False, stop=stop)
        self._say(story.ppo(self._results["ppo"], self._stages["ppo"].run.steps, stop.reason))
        for name in (self._folder("reward"), self._stages["reward"].model.source):
            self._loader.forget(name)
        self._answer_and_forget("ppo")

        self._train("dpo", evaluate_first=False)
        self._say(story.dpo(self._results["dpo"]))
        self._answer_and_forget("dpo")

        self._begin("comparison")
        told = Told(
            model=self._source,
            language=self._language,
            prompts=self._prompts,
            answers=self._answers,
            results=self._results,
            judge=judge,
            scores={n: judge.answers(self._prompts, a) for n, a in self._answers.items()},
            tokens={
                name: [len(self._tok(answer)["input_ids"]) for answer in answers]
                for name, answers in self._answers.items()
            },
            stopped=stop.reason,
        )
        self._end_part()
        self._progress.end()
        summary = summarize(told) | self._costs()
        write_summary(summary, self._out)
        return summary

    def _train(
        self, name: str, *, evaluate_first: bool = True, stop: EarlyStop | None = None
    ) -> None:
        self._begin(name)
        hooks = Hooks(
            loader=self._loader,
            adapt=None if stop is None else stop.adapt,
            make_bar=self._progress.make_bar,
            evaluate_first=evaluate_first,
        )
        self._results[name] = train(self._stages[name], name, hooks=hooks)

    def _judge(self, model: Decoder, params: Any) -> Judge:
        template, options = self._stages["sft"].model.chat_template, self._options
        features = Features(model, params, self._tok, template, options["judge_depth"])
        rows, held_out = self._rows("judge"), self._rows("judge_heldout")
        return train_judge(features, rows, held_out, options["judge_penalty"])

    def _make_lower(self, model: Decoder, params: Any) -> None:
        """The model that the reward model starts from: the lower layers of the SFT model."""
        target = self._stages["reward"].model.source
        if target != f"{self._folder('sft')}/../lower":
            return  # an override names another model
        lower, lower_params = lower_layers(model, params, self._options["reward_depth"])
        save_pretrained(lower, lower_params, target, tokenizer=self._tok)
        self._loader.keep(target, lower, lower_params)

    def _answer_and_forget(self, name: str) -> None:
        self._answer(name, *self._load(self._folder(name)))
        self._loader.forget(self._folder(name))

    def _answer(self, name: str, model: Decoder, params: Any) -> None:
        """Greedy answers to the held-out prompts; one program for all models."""
        self._answers[name] = generate(
            model,
            params,
            self._tok,
            self._prompts,
            max_new_tokens=self._options["answer_tokens"],
            temperature=0.0,
            chat_template=self._stages["sft"].model.chat_template,
            rows=len(self._prompts),
        )

    def _load(self, source: str) -> tuple[Any, Any]:
        config = self._stages["sft"]
        return self._loader.load(source, config.model, config.mesh.make(), remat="none")

    def _folder(self, name: str) -> str:
        return str(self._results[name].model)

    def _rows(self, name: str) -> list[Any]:
        return list(read_rows([str(self._examples / f"{name}.jsonl")]))

    # ------------------------------------------------------------- time and memory

    def _begin(self, part: str) -> None:
        self._end_part()
        self._part = (part, time.perf_counter(), _cpu_seconds())
        self._progress.begin(part)

    def _end_part(self) -> None:
        part, began, busy = self._part
        if part:
            self._spent[part] = (time.perf_counter() - began, _cpu_seconds() - busy)

    def _say(self, text: str) -> None:
        self._progress.say(text)

    def _costs(self) -> dict[str, Any]:
        seconds = {part: round(spent[0], 1) for part, spent in self._spent.items()}
        busy = {part: round(spent[1], 1) for part, spent in self._spent.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return {
            "seconds": seconds | {"total": round(sum(s for s, _ in self._spent.values()), 1)},
            "cpu_seconds": busy | {"total": round(sum(s for _, s in self._spent.values()), 1)},
            "peak_gib": round(peak / unit, 2),
            "machine": {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()},
        }


def _cpu_seconds() -> float:
    """CPU seconds of all threads of this process, independent of other users of the machine."""
    return time.process_time()
