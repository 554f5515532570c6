"""PPO and its relatives on a tiny story model with a sentiment score as reward: score against KL.

    python scripts/bench/story_ppo.py MODEL_FOLDER [--algorithm ppo] [--seeds 0 1 2] [--out FILE]
    python scripts/bench/story_ppo.py MODEL_FOLDER --frontier 0.02 0.04 0.07 0.1 --out FILE
    python scripts/bench/story_ppo.py MODEL_FOLDER --ideal --out FILE
    python scripts/bench/story_ppo.py --plot FILE --csv FILE --svg FILE

MODEL_FOLDER holds a small story model in Hugging Face form (stories260K: 260 K parameters). The
reward is the VADER compound score of the continuation (package vaderSentiment) of one of 32
openings, 60 tokens long. Score and KL (nats an answer, against the model at the start) are means
over 512 fresh samples before training and after a fixed number of iterations.

`--frontier` trains once for each kl_coef, fixed and adaptive (which starts at that coefficient and
holds the KL that the fixed one ended with); `--ideal` samples the start and weighs its samples by
exp(score / β): what a policy without any limits could reach. `--plot` draws all that a file holds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

# A device a core: each works through its own rows, which is faster than two cores on one operation.
if __name__ == "__main__":  # whoever imports this has devices of its own
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(len(os.sched_getaffinity(0))))

import jax
import numpy as np
from _job import append, machine

import jaxalign as ja
from jaxalign import ppo
from jaxalign.data.chat import encode_prompt
from jaxalign.data.packing import prompt_rows

OPENINGS = [
    "Once upon a time, there was a",
    "One day, a little girl",
    "Tom had a big",
    "Lily and her mom",
    "The dog was",
    "There was a small cat",
    "A boy named Tim",
    "In the park,",
    "Sara liked to",
    "The sun was",
    "Ben and Mia",
    "Mom said",
    "The old man",
    "A bird sat",
    "One night,",
    "Max was a",
    "Anna found a",
    "The little fish",
    "At the beach,",
    "Sam wanted to",
    "A frog lived",
    "The teacher gave",
    "Lucy had a red",
    "It was raining and",
    "The big tree",
    "Jack went to",
    "Every morning, the",
    "The bunny saw",
    "Dad made a",
    "Two friends were",
    "A tiny mouse",
    "The train was",
]
COLOURS = ("#444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
ROLLOUTS = 128
FRESH = 512


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one algorithm is run: small steps on fresh samples, one pass over each rollout.

    Several passes moved the policy further from its start for the same score.
    """

    options: dict[str, Any]
    kl_coef: float
    rate: float
    critic_rate: float
    iterations: int
    epochs: int
    minibatches: int
    micro_batches: int = 2


RECIPES = {
    "ppo": Recipe({"vf_coef": 0.5, "lam": 0.98}, 0.0175, 4e-4, 1e-3, 140, 1, 1),
    "rloo": Recipe(
        {"advantage_estimator": "rloo", "samples": 4, "whiten_advantages": True},
        0.025, 4e-4, 0.0, 160, 1, 1,
    ),
    "grpo": Recipe(
        {"advantage_estimator": "grpo", "samples": 4, "kl_in": "loss", "kl_estimator": "k3"},
        0.18, 4e-4, 0.0, 130, 1, 1,
    ),
}  # fmt: skip


class Stories:
    """The story model, its openings and its judge."""

    def __init__(self, folder: pathlib.Path):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.mesh = ja.make_mesh(data=-1, fsdp=1)
        self.tok = ja.load_tokenizer(folder)
        self.model, self.params = ja.load_pretrained(
            folder, mesh=self.mesh, compute_dtype="float32"
        )
        self._ids = [np.asarray(encode_prompt(self.tok, o, "none"), np.int32) for o in OPENINGS]
        judge = SentimentIntensityAnalyzer()
        self.reward = ja.text_reward(
            lambda _, story: judge.polarity_scores(story)["compound"], self.tok
        )

    def prompts(self, rows: int) -> Any:
        """So many openings, each as often as the others."""
        which = [row % len(self._ids) for row in range(rows)]
        return prompt_rows(self._ids, which, rows, max(map(len, self._ids)), self.tok.pad_token_id)

    def config(self, **options: Any) -> ppo.Config:
        """60 new tokens at temperature 1."""
        return ppo.Config(
            max_new_tokens=60,
            stop_tokens=(self.tok.eos_token_id,),
            pad_token=self.tok.pad_token_id,
            **options,
        )


def train(
    stories: Stories, recipe: Recipe, seed: int, kl_target: float | None = None
) -> dict[str, Any]:
    """One run: figures over fresh samples before and after."""
    began = time.perf_counter()
    options = recipe.options | {"kl_coef": recipe.kl_coef}
    if kl_target is not None:
        options |= {"kl_target": kl_target, "kl_horizon": 10.0 * ROLLOUTS}
    config = stories.config(**options)
    critic, params = None, ppo.init_params(stories.params)
    rates = [recipe.rate]
    if config.has_critic:
        critic, critic_params = ja.with_scalar_head(
            stories.model, stories.params, jax.random.key(seed)
        )
        if config.shared_critic:
            critic_params = {"score": critic_params["score"]}
        params = ppo.init_params(stories.params, critic_params)
        rates.append(recipe.critic_rate)
    updates = recipe.iterations * recipe.epochs * recipe.minibatches
    tx = ppo.make_optimizer(
        *(
            ja.make_optimizer(
                ja.OptimizerConfig(learning_rate=rate, schedule="linear", total_steps=updates)
            )
            for rate in rates
        )
    )
    state = ja.init_state(params, tx)
    step = ja.compile_step(
        ppo.make_step(stories.model, critic, tx, config, micro_batches=recipe.micro_batches),
        state,
        stories.mesh,
    )
    prepare = ppo.make_prepare(stories.model, critic, stories.reward, config)
    prompts = stories.prompts(ROLLOUTS // config.samples)

    def measure(number: int) -> list[float]:
        key = jax.random.fold_in(jax.random.key(10_000 + seed), number)
        rows = []
        for part in range(FRESH // ROLLOUTS):
            rollout = prepare(jax.random.fold_in(key, part), state, stories.params, prompts)
            metrics = ppo.rollout_metrics(rollout)
            rows.append([float(metrics["objective/scores"]), float(metrics["objective/kl"])])
        return [float(x) for x in np.mean(rows, axis=0)]

    before, seconds, kl_coef = measure(0), [], recipe.kl_coef
    for iteration in range(recipe.iterations):
        started = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(seed), iteration)
        rollout = prepare(key, state, stories.params, prompts, kl_coef)
        for part in ppo.minibatches(key, rollout, recipe.epochs, recipe.minibatches):
            state, _ = step(state, part)
        if kl_target is not None:
            kl = float(ppo.rollout_metrics(rollout)["objective/kl"])
            kl_coef = ppo.next_kl_coef(kl_coef, kl, config, ROLLOUTS)
        seconds.append(time.perf_counter() - started)
    after = measure(1)
    return {
        "seed": seed,
        "score_before": round(before[0], 4),
        "score": round(after[0], 4),
        "kl": round(after[1], 3),
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_an_iteration": round(float(np.median(seconds)), 2),
        "compiles": step.compiles,
        "kl_coef": recipe.kl_coef,
        "kl_coef_end": round(kl_coef, 5),
        "kl_target": kl_target,
    }


def ideal(stories: Stories, samples: int = 8192) -> list[dict[str, float]]:
    """The start's own samples, each opening's weighed by exp(score / β): score and KL by β.

    KL = Σ w ln(n w) for weights w over the n samples of an opening, a mean over openings.
    """
    config = stories.config(
        advantage_estimator="rloo", samples=samples // len(OPENINGS), slots=ROLLOUTS
    )
    prepare = ppo.make_prepare(stories.model, None, stories.reward, config)
    state = ja.init_state(ppo.init_params(stories.params), ppo.make_optimizer(ja.make_optimizer()))
    rollout = prepare(jax.random.key(77), state, stories.params, stories.prompts(len(OPENINGS)))
    scores = np.asarray(rollout.scores, np.float64).reshape(len(OPENINGS), -1)
    rows = []
    for beta in (8.0, 2.0, 1.0, 0.6, 0.4, 0.3, 0.25, 0.2, 0.16, 0.13, 0.1, 0.08, 0.06, 0.05, 0.04):
        weights = np.exp((scores - scores.max(1, keepdims=True)) / beta)
        weights /= weights.sum(1, keepdims=True)
        seen = np.where(weights > 0, weights, 1.0)
        kl = (weights * np.log(scores.shape[1] * seen)).sum(1)
        score = (weights * scores).sum(1)
        rows.append({"beta": beta, "score": float(score.mean()), "kl": float(kl.mean())})
    return rows


def plot(path: pathlib.Path, table: pathlib.Path, picture: pathlib.Path) -> None:
    """Writes all points of a results file as CSV and as a chart."""
    from jaxalign.commands.report.charts import line_chart, value_ticks

    points: dict[str, list[tuple[float, float, str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "ideal":
            points["ideal"] = [(p["kl"], p["score"], f"β {p['beta']}") for p in row["points"]]
            continue
        name = f"{row['algorithm']}, {'adaptive' if row['kl_target'] else 'fixed'} kl_coef"
        points.setdefault(name, []).append((row["kl"], row["score"], f"kl_coef {row['kl_coef']}"))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "kl", "score", "setting"])
        for name, rows in points.items():
            writer.writerows(
                [name, round(kl, 3), round(score, 4), note] for kl, score, note in sorted(rows)
            )
    lines = {name: [(kl, score) for kl, score, _ in sorted(rows)] for name, rows in points.items()}
    most = max(kl for line in lines.values() for kl, _ in line)
    drawn = line_chart(
        list(lines.values()),
        "score against KL",
        "KL to the start, nats an answer",
        "score",
        [tick for tick in value_ticks(0.0, most) if tick <= most],
    )
    # A picture of its own has neither a page's colours nor its legend.
    style = "text{font:11px sans-serif}.mid{text-anchor:middle}.end{text-anchor:end}"
    style += ".grid{stroke:#ddd}polyline{fill:none;stroke-width:1.5}"
    legend = ""
    for number, (name, colour) in enumerate(zip(lines, COLOURS, strict=False)):
        style += f"polyline.s{number}{{stroke:{colour}}}circle.s{number}{{fill:{colour}}}"
        place = f'x="200" y="{150 - 14 * number}" fill="{colour}"'
        legend += f"<text {place}>{name}</text>"
    start = drawn.index(">") + 1
    head = drawn[:start].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    body = drawn[start:].removesuffix("</svg>")
    picture.write_text(f"{head}<style>{style}</style>{body}{legend}</svg>\n", encoding="utf-8")


def main() -> None:
    """Runs what was asked for; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, nargs="?")
    parser.add_argument("--algorithm", choices=RECIPES, default="ppo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frontier", type=float, nargs="+", metavar="KL_COEF")
    parser.add_argument("--ideal", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    parser.add_argument("--plot", type=pathlib.Path, help="results file to draw")
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--svg", type=pathlib.Path)
    for name in ("kl-coef", "rate", "critic-rate"):
        parser.add_argument(f"--{name}", type=float, help="instead of the recipe's")
    for name in ("iterations", "epochs", "minibatches", "micro-batches"):
        parser.add_argument(f"--{name}", type=int, help="instead of the recipe's")
    parser.add_argument("--options", type=json.loads, default={}, help="of ppo.Config, as JSON")
    given = parser.parse_args()
    if given.plot:
        plot(given.plot, given.csv, given.svg)
        return
    stories = Stories(given.model)
    named = [field.name for field in dataclasses.fields(Recipe) if field.name != "options"]
    named = [name for name in named if hasattr(given, name)]
    changes = {name: getattr(given, name) for name in named if getattr(given, name) is not None}
    recipe = RECIPES[given.algorithm]
    changes["options"] = recipe.options | given.options
    recipe = dataclasses.replace(recipe, **changes)

    def report(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if given.out:
            append(given.out, machine() | row)

    named = ("iterations", "rate", "critic_rate", "epochs", "minibatches", "options")
    about = {"algorithm": given.algorithm} | {name: getattr(recipe, name) for name in named}
    if given.ideal:
        report({"kind": "ideal", "points": ideal(stories)})
    elif given.frontier:
        for kl_coef in given.frontier:
            there = dataclasses.replace(recipe, kl_coef=kl_coef)
            fixed = train(stories, there, given.seeds[0])
            report({"kind": "frontier"} | about | fixed)
            adaptive = train(stories, there, given.seeds[0], kl_target=fixed["kl"])
            report({"kind": "frontier"} | about | adaptive)
    else:
        for seed in given.seeds:
            report({"kind": "run"} | about | train(stories, recipe, seed))


if __name__ == "__main__":
    main()
