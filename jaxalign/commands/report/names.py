"""The display name, unit and chart section of each metric in a report."""

from __future__ import annotations

from typing import NamedTuple

RESULTS, OPTIMISATION, ANSWERS, COST, OTHER = (
    "Results",
    "Optimisation",
    "Answers",
    "Throughput",
    "Other metrics",
)
SECTIONS = (RESULTS, ANSWERS, OPTIMISATION, COST, OTHER)
"""In the order of the page; the last one is folded away."""


class Name(NamedTuple):
    """How a metric is shown.

    Attributes:
      title: for people.
      unit: along the vertical axis; "" for a plain number.
      section: one of `SECTIONS`.
    """

    title: str
    unit: str
    section: str


_NATS, _SHARE, _SECONDS = "nats", "share", "seconds"

_NAMES = {
    # key: (title, unit, section), in the order of the charts
    "loss": ("Loss", "", RESULTS),
    "nll": ("Negative log-likelihood", "nats a token", RESULTS),
    "accuracy": ("Pairs ranked right", _SHARE, RESULTS),
    "margin": ("Score margin", "score", RESULTS),
    "rewards/accuracies": ("Pairs ranked right", _SHARE, RESULTS),
    "rewards/margins": ("Implicit reward margin", _NATS, RESULTS),
    "objective/scores": ("Score of the answers", "score", RESULTS),
    "objective/kl": ("KL from the reference", "nats an answer", RESULTS),
    "objective/rlhf_reward": ("Reward after the KL penalty", "reward", RESULTS),
    "scores/chosen": ("Score of chosen answers", "score", RESULTS),
    "scores/rejected": ("Score of rejected answers", "score", RESULTS),
    "rewards/chosen": ("Implicit reward, chosen", _NATS, RESULTS),
    "rewards/rejected": ("Implicit reward, rejected", _NATS, RESULTS),
    "logps/chosen": ("Log-probability, chosen", "nats an answer", RESULTS),
    "logps/rejected": ("Log-probability, rejected", "nats an answer", RESULTS),
    "best": ("Best answer found", _SHARE, RESULTS),
    "kl": ("KL estimate", _NATS, RESULTS),
    "entropy": ("Entropy", "nats a token", RESULTS),
    "judge/score": ("Judge's score", "score", RESULTS),
    "response/length": ("Answer length", "tokens", ANSWERS),
    "response/length_min": ("Shortest answer", "tokens", ANSWERS),
    "response/length_max": ("Longest answer", "tokens", ANSWERS),
    "response/finished": ("Answers that end by themselves", _SHARE, ANSWERS),
    "response/trained": ("Answers in the loss", _SHARE, ANSWERS),
    "objective/scores_std": ("Spread of the scores", "std of scores", ANSWERS),
    "objective/entropy": ("Entropy of an answer", "nats an answer", ANSWERS),
    "policy/entropy_avg": ("Entropy of a token", "nats a token", ANSWERS),
    "groups/equal": ("Answers in zero-variance groups", _SHARE, ANSWERS),
    "groups/draws": ("Batches of prompts drawn", "batches", ANSWERS),
    "groups/left_equal": ("Zero-variance groups left", "groups", ANSWERS),
    "objective/non_score_reward": ("KL penalty in the reward", "reward", ANSWERS),
    "objective/kl_k2": ("KL by the k2 estimator", "nats an answer", ANSWERS),
    "objective/kl_k3": ("KL by the k3 estimator", "nats an answer", ANSWERS),
    "grad_norm": ("Gradient norm", "2-norm", OPTIMISATION),
    "grad_norm/policy": ("Gradient norm, policy", "2-norm", OPTIMISATION),
    "grad_norm/critic": ("Gradient norm, critic", "2-norm", OPTIMISATION),
    "learning_rate": ("Learning rate", "", OPTIMISATION),
    "critic/learning_rate": ("Learning rate, critic", "", OPTIMISATION),
    "kl_coef": ("KL coefficient β", "", OPTIMISATION),
    "loss/policy_avg": ("Policy loss", "", OPTIMISATION),
    "loss/value_avg": ("Value loss", "", OPTIMISATION),
    "loss/ptx_avg": ("Text loss (PTX)", "nats a token", OPTIMISATION),
    "loss/kl_avg": ("KL term of the loss", _NATS, OPTIMISATION),
    "policy/approxkl_avg": ("KL of an iteration's updates", _NATS, OPTIMISATION),
    "policy/clipfrac_avg": ("Policy tokens clipped", _SHARE, OPTIMISATION),
    "val/clipfrac_avg": ("Value tokens clipped", _SHARE, OPTIMISATION),
    "val/ratio": ("Probability ratio π/π_old", "mean", OPTIMISATION),
    "val/ratio_var": ("Variance of the ratio", "", OPTIMISATION),
    "critic/explained_variance": ("Critic: explained variance", _SHARE, OPTIMISATION),
    "updates": ("Updates in an iteration", "updates", OPTIMISATION),
    "bad_steps": ("Updates skipped", "updates", OPTIMISATION),
    "router": ("Load-balancing loss", "", OPTIMISATION),
    "critic_router": ("Load-balancing loss, critic", "", OPTIMISATION),
    "time/tokens_per_second": ("Throughput", "tokens a second", COST),
    "time/step": ("Time of a step", _SECONDS, COST),
    "time/mfu": ("Model FLOPs utilisation", _SHARE, COST),
    "time/model_flops_per_second": ("Model FLOPs", "FLOPs a second", COST),
    "time/rollout": ("Time of sampling answers", _SECONDS, COST),
    "time/reward": ("Time of scoring answers", _SECONDS, COST),
    "time/experience": ("Time of the forward passes", _SECONDS, COST),
    "time/data": ("Time waiting for data", _SECONDS, COST),
    "data/fill": ("Token slots filled", _SHARE, COST),
    "tokens_seen": ("Tokens seen", "tokens", COST),
    "samples_seen": ("Samples seen", "samples", OTHER),
    "epoch": ("Passes over the data", "epochs", OTHER),
    "logprobs/mean_difference": ("Sampler against trainer, mean", _NATS, OTHER),
    "logprobs/max_difference": ("Sampler against trainer, largest", _NATS, OTHER),
    "val/num_eos_tokens": ("Answers with a stop token", "answers", OTHER),
}

_PREFIXES = {
    "loss/": ("Loss: {}", "", RESULTS),
    "rewards/": ("Reward: {}", "reward", RESULTS),
    "mse/": ("Squared error: {}", "", RESULTS),
    "nll/": ("Negative log-likelihood: {}", "nats a token", RESULTS),
    "applies/": ("Answers that {} applies to", _SHARE, OTHER),
    "share/": ("Share of the batch: {}", _SHARE, OTHER),
    "weight/": ("Counted in {}", "", OTHER),
    "time/": ("Time: {}", _SECONDS, COST),
}

_ORDER = {key: number for number, key in enumerate(_NAMES)}


def name_of(key: str) -> Name:
    """The name of a metric; if it is not in the table, a name made from its key.

    A held-out metric (`eval/…`) has the name of the metric it measures.
    """
    plain = key.removeprefix("eval/")
    if plain in _NAMES:
        return Name(*_NAMES[plain])
    for prefix, (title, unit, section) in _PREFIXES.items():
        if plain.startswith(prefix):
            return Name(title.format(_words(plain.removeprefix(prefix))), unit, section)
    words = _words(plain)
    return Name(words[:1].upper() + words[1:], "", RESULTS if plain != key else OTHER)


def order_of(key: str) -> tuple[int, str]:
    """The sort key of a metric on the page: metrics in the table first, then by key."""
    plain = key.removeprefix("eval/")
    return (_ORDER.get(plain, len(_ORDER)), plain)


def _words(key: str) -> str:
    return key.replace("/", ", ").replace("_", " ")
