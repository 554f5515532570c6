"""jaxalign: align language models with people, in JAX.

    files → examples → token batches → (prepare) → losses → step → state → checkpoint → HF export

Importing this package loads nothing else. Each public name is imported when it is first used, so
a program that only needs the losses never loads tokenizers, checkpoints or data readers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of `_NAMES` and `_MODULES` again, for editors and type checkers
    from jaxalign import losses
    from jaxalign.algorithms import dpo, kto, ppo, reward, sft
    from jaxalign.algorithms.compile import compile_step
    from jaxalign.algorithms.loss import Loss
    from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer, make_schedule
    from jaxalign.algorithms.state import init_state
    from jaxalign.algorithms.step import make_eval, make_step
    from jaxalign.data import (
        Source,
        graded_batches,
        pack_pairs,
        pack_tokens,
        preference_batches,
        prompt_batches,
        ranked_batches,
        sft_batches,
        step_batches,
        unpaired_batches,
    )
    from jaxalign.hf import (
        load_adapter,
        load_adapters,
        load_pretrained,
        load_tokenizer,
        save_adapter,
        save_pretrained,
    )
    from jaxalign.models.base import combine
    from jaxalign.models.decoder import Decoder
    from jaxalign.models.lm_head import target_logprobs, target_sum
    from jaxalign.models.lora import LoraConfig, add_lora, merge_lora
    from jaxalign.models.scorer import Scorer, pooled_scores, weigh_attributes, with_scalar_head
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.parallel.rules import use_rules
    from jaxalign.parallel.sharding import local_rows, shard_batch
    from jaxalign.rewards import model_reward, text_reward
    from jaxalign.rewards.best_of import model_judge
    from jaxalign.rewards.scoring import score_conversations, score_rows
    from jaxalign.run.config.runs import load_config
    from jaxalign.sampling.generate import Generation, generate, sample
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

_MODULES = {"losses": "losses"} | {
    name: f"algorithms.{name}" for name in ("dpo", "kto", "ppo", "reward", "sft")
}
"""Public modules → where they are in the package."""

_NAMES = {
    "algorithms.compile": "compile_step",
    "algorithms.loss": "Loss",
    "algorithms.optim": "OptimizerConfig make_optimizer make_schedule",
    "algorithms.state": "init_state",
    "algorithms.step": "make_eval make_step",
    "data": "Source graded_batches pack_pairs pack_tokens preference_batches prompt_batches "
    "ranked_batches sft_batches step_batches unpaired_batches",
    "hf": "load_adapter load_adapters load_pretrained load_tokenizer save_adapter save_pretrained",
    "models.base": "combine",
    "models.decoder": "Decoder",
    "models.lm_head": "target_logprobs target_sum",
    "models.lora": "LoraConfig add_lora merge_lora",
    "models.scorer": "Scorer pooled_scores weigh_attributes with_scalar_head",
    "parallel.mesh": "make_mesh",
    "parallel.rules": "use_rules",
    "parallel.sharding": "local_rows shard_batch",
    "rewards": "model_reward text_reward",
    "rewards.best_of": "model_judge",
    "rewards.scoring": "score_conversations score_rows",
    "run.config.runs": "load_config",
    "sampling.generate": "Generation generate sample",
    "types": "GradedBatch PairBatch PromptBatch RankedBatch RolloutBatch SharedPairBatch StepBatch "
    "TokenBatch TrainState UnpairedBatch Weighted",
}
"""Module → the public names that it defines."""

_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

_ROOMS = [
    "algorithms",
    "data",
    "hf",
    "models",
    "parallel",
    "plan",
    "rewards",
    "run",
    "sampling",
    "types",
]

__all__ = sorted([*_MODULES, *_HOME])


def __getattr__(name: str) -> Any:
    """Imports a public name, or a room of the package, when it is first used (PEP 562)."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"jaxalign.{_HOME[name]}"), name)
    elif name in _MODULES or name in _ROOMS:
        value = importlib.import_module(f"jaxalign.{_MODULES.get(name, name)}")
    else:
        raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
