"""Finds problems in a run's metrics, and says what to do about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxalign.commands.report.axes import short
from jaxalign.commands.report.load import Run

SERIOUS, NOTABLE = "serious", "notable"

_FEWEST = 5  # the fewest values for a trend


class Finding(NamedTuple):
    """Something to look at.

    Attributes:
      level: `SERIOUS` or `NOTABLE`.
      message: what is seen, with its figure.
      remedy: what to do.
    """

    level: str
    message: str
    remedy: str


Rule = Callable[[Run], Iterator[Finding]]


def warnings_of(run: Run) -> list[Finding]:
    """Everything that stands out in a run, serious findings first."""
    found = [warning for rule in _RULES for warning in rule(run)]
    return sorted(found, key=lambda warning: warning.level != SERIOUS)


def _values(run: Run, key: str) -> list[float]:
    return [value for _, value in run.curves.get(key, ())]


def _ends(run: Run, key: str, fewest: int = _FEWEST) -> tuple[float, float] | None:
    """Means over the first and the last tenth of a metric; None if it has too few values."""
    values = [value for value in _values(run, key) if math.isfinite(value)]
    if len(values) < fewest:
        return None
    size = max(1, len(values) // 10)
    return statistics.fmean(values[:size]), statistics.fmean(values[-size:])


def _stopped(run: Run) -> Iterator[Finding]:
    if run.state.startswith("stopped"):
        yield Finding(
            NOTABLE,
            f"The run {run.state}.",
            "Go on with run.resume=auto, if it is to be finished.",
        )


def _not_finite(run: Run) -> Iterator[Finding]:
    for key in ("loss", "grad_norm"):
        bad = [step for step, value in run.curves.get(key, ()) if not math.isfinite(value)]
        if bad:
            yield Finding(
                SERIOUS,
                f"{key} was not a finite number in {len(bad)} steps, first in {bad[0]:g}.",
                "Look at that step with `jaxalign explain`; lower the learning rate, warm it up "
                "longer, or clip gradients (optimizer.max_grad_norm).",
            )


def _skipped(run: Run) -> Iterator[Finding]:
    count = sum(value for value in _values(run, "bad_steps") if math.isfinite(value))
    if count:
        yield Finding(
            SERIOUS,
            f"{count:g} updates were skipped, whose loss or gradient was not finite or a spike.",
            "The terminal named their rows; `jaxalign explain` shows such a step.",
        )


def _spikes(run: Run) -> Iterator[Finding]:
    curve = [(s, v) for s, v in run.curves.get("grad_norm", ()) if math.isfinite(v)]
    if len(curve) < 20:
        return
    middle = statistics.median(v for _, v in curve)
    step, most = max(curve[len(curve) // 10 :], key=lambda point: point[1])
    if middle > 0 and most > 20 * middle:
        yield Finding(
            NOTABLE,
            f"The gradient norm rose to {most / middle:.0f} times its median, at step {step:g}.",
            "Clip gradients (optimizer.max_grad_norm) or skip such updates (run.skip_spikes).",
        )


def _recompiled(run: Run) -> Iterator[Finding]:
    count = max(_values(run, "compiles"), default=0)
    if count > 1 and run.options.get("data.buckets", "None") == "None":
        yield Finding(
            NOTABLE,
            f"The step was compiled {count:g} times.",
            "Shapes changed along the way; without data.buckets one compilation is enough.",
        )


def _waits(run: Run) -> Iterator[Finding]:
    data, step = run.typical("time/data"), run.typical("time/step")
    if data and step and data > 0.2 * step:
        yield Finding(
            NOTABLE,
            f"{data / step:.0%} of a step's time went into waiting for data.",
            "Raise data.prefetch, or put the data on a faster disk.",
        )


def _padding(run: Run) -> Iterator[Finding]:
    fill = run.typical("data/fill")
    if fill is not None and fill < 0.5 and run.algorithm != "ppo":
        yield Finding(
            NOTABLE,
            f"Only {fill:.0%} of the token slots held tokens; the rest was padding.",
            "Set data.packing=true, a shorter data.length, or data.buckets.",
        )


def _overfit(run: Run) -> Iterator[Finding]:
    for key, curve in run.curves.items():
        if not key.startswith("eval/loss/"):
            continue
        finite = [(v, s) for s, v in curve if math.isfinite(v)]
        if len(finite) < 3:
            continue
        (low, at), (last, _) = min(finite), finite[-1]
        if last > 1.02 * low and last - low > 0.005:
            yield Finding(
                NOTABLE,
                f"{key} was lowest at step {at:g} ({short(low)}) and ended at {short(last)}: the "
                "model began to overfit.",
                f"Keep the best checkpoint (run.keep_best: {key}), stop there "
                "(run.early_stopping), or train for fewer epochs.",
            )


def _far(run: Run) -> Iterator[Finding]:
    ends = _ends(run, "objective/kl")
    if ends is not None and ends[1] > 30:
        yield Finding(
            SERIOUS,
            f"The policy is {ends[1]:.0f} nats an answer from its reference: the score may be "
            "exploited rather than learned.",
            "Read the samples; raise ppo.kl_coef, set ppo.kl_target, or end earlier (stop_kl).",
        )
    scores = _ends(run, "eval/objective/scores", 3)
    train = _ends(run, "objective/scores")
    if scores and train and train[1] > train[0] and scores[1] < scores[0]:
        yield Finding(
            SERIOUS,
            f"The score rose in training ({short(train[0])} → {short(train[1])}) and fell on "
            f"held-out prompts ({short(scores[0])} → {short(scores[1])}).",
            "More prompts, fewer epochs, or a larger ppo.kl_coef.",
        )


def _answers(run: Run) -> Iterator[Finding]:
    finished = _ends(run, "response/finished")
    if finished and finished[1] < 0.5:
        yield Finding(
            NOTABLE,
            f"Only {finished[1]:.0%} of the last answers ended with a stop token; the others were "
            "cut off.",
            "Raise ppo.max_new_tokens, train SFT first, or set ppo.missing_eos_penalty.",
        )
    length = _ends(run, "response/length")
    if length and length[0] > 0 and length[1] > 2 * length[0]:
        yield Finding(
            NOTABLE,
            f"Answers grew from {length[0]:.0f} to {length[1]:.0f} tokens: the reward may like "
            "length alone.",
            "Compare scores at equal length (`jaxalign eval` controls for it); balance the pairs "
            "of the reward model, or add a penalty on length.",
        )
    entropy = _ends(run, "policy/entropy_avg")
    if entropy and entropy[0] > 0.1 and entropy[1] < 0.2 * entropy[0]:
        yield Finding(
            NOTABLE,
            f"The policy's entropy fell from {short(entropy[0])} to {short(entropy[1])} nats a "
            "token: its answers are nearly the same.",
            "Set ppo.entropy_coef, a larger ppo.kl_coef, and a ppo.temperature of 1.",
        )
    groups = _ends(run, "groups/equal")
    if groups and groups[1] > 0.5:
        yield Finding(
            NOTABLE,
            f"All answers to a prompt scored alike in {groups[1]:.0%} of the groups, which teach "
            "nothing.",
            "Harder or easier prompts, more ppo.samples, or prompt_draws.",
        )


def _updates(run: Run) -> Iterator[Finding]:
    clipped = _ends(run, "policy/clipfrac_avg")
    if clipped and clipped[1] > 0.3:
        yield Finding(
            NOTABLE,
            f"Clipping acted on {clipped[1]:.0%} of the tokens: the updates are too large.",
            "Lower the learning rate, make fewer updates an iteration, or set target_kl.",
        )
    explained = _ends(run, "critic/explained_variance")
    if explained and explained[1] < 0:
        yield Finding(
            NOTABLE,
            f"The critic predicts worse than a mean: explained variance {short(explained[1])}.",
            "Start it with critic_warmup or critic_head: zero, or raise its learning rate.",
        )
    gap = _ends(run, "logprobs/mean_difference")
    if gap and gap[1] > 0.05:
        yield Finding(
            SERIOUS,
            f"Sampler and trainer differ by {short(gap[1])} nats a token.",
            "Use the same dtypes for both (ppo.cache_dtype); ppo.logprob_tolerance bounds it.",
        )


def _pairs(run: Run) -> Iterator[Finding]:
    for key in ("accuracy", "rewards/accuracies"):
        right = _ends(run, f"eval/{key}", 2) or _ends(run, key)
        if right and right[1] < 0.55:
            yield Finding(
                NOTABLE,
                f"{right[1]:.0%} of the pairs are ranked right, about as many as by chance.",
                "Check the order of chosen and rejected with `jaxalign data`; raise the learning "
                "rate or train longer.",
            )
    chosen = _ends(run, "logps/chosen")
    if chosen and chosen[1] < chosen[0] - max(5.0, 0.2 * abs(chosen[0])):
        yield Finding(
            NOTABLE,
            f"Chosen answers lost probability ({short(chosen[0])} → {short(chosen[1])} nats): the "
            "loss is won by making rejected ones even less likely.",
            "Raise dpo.beta, lower the learning rate, or add dpo.sft_coef.",
        )


_RULES: Sequence[Rule] = (
    *(_stopped, _not_finite, _skipped, _spikes, _recompiled, _waits, _padding, _overfit),
    *(_far, _answers, _updates, _pairs),
)
