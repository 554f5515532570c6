"""What a stage's metrics mean, one sentence each."""

from __future__ import annotations

import math

from jaxalign.commands.quickstart.judge import Rate
from jaxalign.run.loop import Result


def sft(result: Result) -> str:
    """After SFT."""
    if "loss/nll" not in result.after:
        return "SFT: no held-out conversations, so nothing says whether it learned."
    before, after = result.before["loss/nll"], result.after["loss/nll"]
    times = math.exp(before - after)
    return (
        f"SFT: the loss on held-out conversations went from {before:.2f} to {after:.2f} nats a "
        f"token: each of their words is {times:.1f} times as likely now."
    )


def judge(accuracy: Rate) -> str:
    """After the judge."""
    return (
        f"Judge: it ranks {accuracy.share:.0%} of {accuracy.count} held-out pairs right (95 % "
        f"interval {accuracy.low:.0%} to {accuracy.high:.0%}); nothing is trained on its word, so "
        "it can tell whether what follows is better."
    )


def reward(result: Result) -> str:
    """After the reward model."""
    share = (result.after or result.history[-1])["accuracy"]
    return (
        f"Reward model: it ranks {share:.0%} of the held-out pairs right (50 % is chance): a score "
        "that wants warmth and an answer, which PPO now maximises."
    )


def ppo(result: Result, steps: int, stopped: str) -> str:
    """After PPO."""
    first, last = result.history[0], result.history[-1]
    kl = result.after.get("objective/kl", last["objective/kl"])
    done = len(result.history)
    end = f"; {stopped}"
    if done < steps:
        end = f"; it ended after {done} of {steps} iterations, since {stopped}"
    return (
        f"PPO: the reward model's mean score went from {first['objective/scores']:.2f} to "
        f"{last['objective/scores']:.2f} on training prompts{end if stopped else ''}. Its answers "
        f"are now {kl:.1f} nats from the SFT model's (the aim is at most 5)."
    )


def dpo(result: Result) -> str:
    """After DPO. Its last pairs were measured before their update, when they were new to it."""
    last = result.history[-1]
    return (
        f"DPO: without a reward model it came to prefer the chosen answer in "
        f"{last['rewards/accuracies']:.0%} of pairs that it had not seen, by "
        f"{last['rewards/margins']:.2f} nats of implicit reward."
    )
