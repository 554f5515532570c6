"""Reward functions: `(prompts with answers, prompts) -> scores [B]`, whatever scores them.

| what scores | made by |
| --- | --- |
| a trained reward model with the policy's tokenizer | `model_reward` |
| one with a tokenizer and a chat template of its own | `retokenised_reward` |
| a Python function of prompt, completion and data row | `text_reward` |
| a Python function of whole lists, as TRL's GRPOTrainer calls them | `batch_reward` |
| the final number of a calculation | `text_reward` of `gsm8k_answer` |
| constraints that an answer is to follow | `text_reward` of `ifeval_constraints` |
| a regular expression | `text_reward` of `regex_match` |
| the number of tokens | `length_reward` |
| a server | `http_reward` |
| several of these, with weights | `combine_rewards` |
| what a configuration names | `build_reward` |

Any callable of that form will do for PPO; docs/rewards.md tells how to write one. Importing this
package loads neither transformers nor the data room.

With several processes the arrays are global. A function that computes with them gives global
scores; one that reads them in Python takes `jaxalign.local_rows` of them and gives the scores of
those rows, so that each host does its own.
"""

from jaxalign.rewards.build import build_reward
from jaxalign.rewards.cases import Case, RewardError
from jaxalign.rewards.combine import combine_rewards
from jaxalign.rewards.gsm8k import gsm8k_answer
from jaxalign.rewards.ifeval import ifeval_accuracy, ifeval_constraints
from jaxalign.rewards.length import length_reward
from jaxalign.rewards.model import model_reward
from jaxalign.rewards.other_tokenizer import retokenised_reward
from jaxalign.rewards.regex import regex_match
from jaxalign.rewards.remote import http_reward
from jaxalign.rewards.text import TextReward, batch_reward, text_reward

__all__ = [
    "Case",
    "RewardError",
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
    "retokenised_reward",
    "text_reward",
]
