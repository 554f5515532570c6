"""jaxalign: align language models with people, in JAX.

    files → examples → token batches → (prepare) → losses → step → state → checkpoint → HF export

Importing this package loads jax, flax and optax only. What reads files, tokenizers or checkpoints
is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxalign.commands.startup import huge_pages

huge_pages.restart_command()  # where this is the command: before JAX is loaded

from jaxalign import losses
from jaxalign.algorithms import dpo, kto, ppo, reward, sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxalign.algorithms.state import init_state
from jaxalign.algorithms.step import make_eval
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lm_head import target_logprobs, target_sum
from jaxalign.models.lora import LoraConfig, add_lora, merge_lora
from jaxalign.models.scorer import Scorer, pooled_scores, weigh_attributes, with_scalar_head
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.rules import use_rules
from jaxalign.parallel.sharding import local_rows, shard_batch
from jaxalign.rewards import model_reward, text_reward
from jaxalign.sampling.generate import generate, sample
from jaxalign.types import (
    GradedBatch,
    PairBatch,
    PromptBatch,
    RankedBatch,
    RolloutBatch,
    SharedPairBatch,
    StepBatch,
    TokenBatch,
    TrainState,
    UnpairedBatch,
    Weighted,
)

if TYPE_CHECKING:
    from jaxalign.data import (
        Source,
        graded_batches,
        preference_batches,
        prompt_batches,
        ranked_batches,
        sft_batches,
        step_batches,
        unpaired_batches,
    )
    from jaxalign.hf import load_pretrained, load_tokenizer, save_pretrained
    from jaxalign.rewards.best_of import model_judge
    from jaxalign.rewards.scoring import score_conversations, score_rows
    from jaxalign.run.config.runs import load_config

_LAZY = {
    "Source": "jaxalign.data",
    "graded_batches": "jaxalign.data",
    "model_judge": "jaxalign.rewards.best_of",
    "load_config": "jaxalign.run.config.runs",
    "load_pretrained": "jaxalign.hf",
    "load_tokenizer": "jaxalign.hf",
    "score_conversations": "jaxalign.rewards.scoring",
    "score_rows": "jaxalign.rewards.scoring",
    "preference_batches": "jaxalign.data",
    "prompt_batches": "jaxalign.data",
    "ranked_batches": "jaxalign.data",
    "save_pretrained": "jaxalign.hf",
    "sft_batches": "jaxalign.data",
    "step_batches": "jaxalign.data",
    "unpaired_batches": "jaxalign.data",
}

__all__ = [
    "Decoder",
    "GradedBatch",
    "LoraConfig",
    "OptimizerConfig",
    "PairBatch",
    "PromptBatch",
    "RankedBatch",
    "RolloutBatch",
    "Scorer",
    "SharedPairBatch",
    "Source",
    "StepBatch",
    "TokenBatch",
    "TrainState",
    "UnpairedBatch",
    "Weighted",
    "add_lora",
    "combine",
    "compile_step",
    "dpo",
    "generate",
    "graded_batches",
    "init_state",
    "kto",
    "load_config",
    "load_pretrained",
    "load_tokenizer",
    "local_rows",
    "losses",
    "make_eval",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "merge_lora",
    "model_judge",
    "model_reward",
    "pooled_scores",
    "ppo",
    "preference_batches",
    "prompt_batches",
    "ranked_batches",
    "reward",
    "sample",
    "save_pretrained",
    "score_conversations",
    "score_rows",
    "sft",
    "sft_batches",
    "shard_batch",
    "step_batches",
    "target_logprobs",
    "target_sum",
    "text_reward",
    "unpaired_batches",
    "use_rules",
    "weigh_attributes",
    "with_scalar_head",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
