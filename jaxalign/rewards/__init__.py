"""Rewards, scoring of rows, best-of-n and evaluation: everything that judges an answer.

A reward function maps `(prompts with answers, prompts)` to scores `[B]`:

| score | made by |
| --- | --- |
| a trained reward model with the policy's tokenizer | `model_reward` |
| a reward model with its own tokenizer and chat template | `retokenised_reward` |
| a Python function of prompt, completion and data row | `text_reward` |
| a Python function of whole lists, as TRL's GRPOTrainer calls them | `batch_reward` |
| the final number of a calculation | `text_reward` of `gsm8k_answer` |
| checkable instructions (IFEval) | `text_reward` of `ifeval_constraints` |
| a regular expression | `text_reward` of `regex_match` |
| the number of tokens | `length_reward` |
| a server | `http_reward` |
| a weighted sum of several | `combine_rewards` |
| a configuration's `rewards:` | `build_reward` |

PPO takes any callable of that form; docs/rewards.md shows how to write one. `register_reward` adds
a kind to the `rewards:` of configurations. Importing this package registers the built-in kinds; it
loads neither transformers nor the data room.

With several processes the arrays are global. A reward that computes on them returns global scores.
A reward that reads them in Python takes their `jaxalign.local_rows` and returns those rows' scores,
so that each host scores its own rows.
"""

from jaxalign.rewards.build import build_reward
from jaxalign.rewards.cases import Case, RewardError
from jaxalign.rewards.combine import combine_rewards
from jaxalign.rewards.function import FunctionReward
from jaxalign.rewards.gsm8k import gsm8k_answer
from jaxalign.rewards.ifeval import ifeval_accuracy, ifeval_constraints
from jaxalign.rewards.length import length_reward
from jaxalign.rewards.model import model_reward
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.rewards.other_tokenizer import retokenised_reward
from jaxalign.rewards.regex import regex_match
from jaxalign.rewards.remote import http_reward
from jaxalign.rewards.specs import RewardSpec, register_reward
from jaxalign.rewards.text import TextReward, batch_reward, text_reward

__all__ = [
    "Case",
    "FunctionReward",
    "ModelReward",
    "RewardError",
    "RewardSpec",
    "TextReward",
    "batch_reward",
    "build_reward",
    "combine_rewards",
    "gsm8k_answer",
    "http_reward",
    "ifeval_accuracy",
    "ifeval_constraints",
    "length_reward",
    "model_reward",
    "regex_match",
    "register_reward",
    "retokenised_reward",
    "text_reward",
]
