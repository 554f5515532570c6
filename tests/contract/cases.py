"""The four algorithms as the contract battery sees them: parameters, a step, batches."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tiny

from jaxalign.algorithms import dpo, ppo, reward, sft
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.types import PairBatch, RolloutBatch

# Lengths as uneven as they come: the weights of micro-batches and devices all differ.
LENGTHS = (3, 12, 5, 9, 13, 4, 7, 10)
ROWS = len(LENGTHS)
LENGTH = 13

# A large Adam ε keeps the update a smooth function of the gradient: with the usual 1e-8 an entry
# whose gradient is rounding noise moves by ± the learning rate, and nothing could be compared.
_OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", eps=1e-3, weight_decay=0.01, max_grad_norm=5.0
)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One algorithm.

    Attributes:
      name: of the algorithm.
      model: with `axes` and `shapes`; for PPO both models in a dict.
      step: `(tx, micro_batches) -> step`.
      documents: rng → list of examples, one a length in `LENGTHS`.
      batch: (examples, groups, length, left) → batch.
      spoil: (batch, rng) → the batch with NaN and nonsense in all slots that mean nothing.
    """

    name: str
    axes: Any
    shapes: Any
    step: Callable[..., Any]
    tx: optax.GradientTransformation
    documents: Callable[..., list[Any]]
    batch: Callable[..., Any]
    spoil: Callable[..., Any]

    def __repr__(self):
        return self.name

    @functools.cached_property
    def params(self):
        return jax.tree.map(np.asarray, _params(self))

    def state(self, shardings=None):
        """A fresh state, on the first device or laid out on a mesh."""
        params = self.params if shardings is None else jax.device_put(self.params, shardings)
        return init_state(params, self.tx)

    @functools.cache  # noqa: B019
    def jitted(self, micro_batches=1):
        return jax.jit(self.step(self.tx, micro_batches=micro_batches))

    def padded(self, seed=0, rows=None):
        """One example a row, with empty rows up to `rows`."""
        examples = self.documents(np.random.default_rng(seed))
        return self.batch(examples, tiny.alone(ROWS, rows), LENGTH)


def _params(case):
    if case.name == "ppo":
        parts = (case.shapes["policy"], case.shapes["critic"])
        return ppo.init_params(*(_random(x, seed) for seed, x in enumerate(parts, start=1)))
    return _random(case.shapes, 1 if "head" in case.shapes else 2)


def _random(shapes, seed):
    return tiny.random_params(types.SimpleNamespace(shapes=shapes), seed)


def _documents(rng):
    return [tiny.document(rng, length) for length in LENGTHS]


def _sft_batch(documents, groups, length, left=False):
    return tiny.token_batch(tiny.lay(documents, groups, length, left=left))


# Preference pairs: both sides of uneven length, with a margin and reference log-probabilities.


def _pairs(rng):
    pairs = []
    for chosen, rejected in zip(LENGTHS, reversed(LENGTHS), strict=True):
        prompt = int(rng.integers(1, min(chosen, rejected)))
        pairs.append(
            {
                "chosen": tiny.document(rng, chosen, prompt),
                "rejected": tiny.document(rng, rejected, prompt),
                "margin": rng.uniform(0, 1),
                "ref_chosen_logps": -4.5 * (chosen - prompt) + rng.normal(),
                "ref_rejected_logps": -4.5 * (rejected - prompt) + rng.normal(),
            }
        )
    return pairs


def _pair_batch(names):
    """A batch maker; `names` are the per-pair arrays that the algorithm reads."""

    def batch(pairs, groups, length, left=False):
        packed = max(map(len, groups)) > 1
        slots = max(1, *map(len, groups))
        shape = (len(groups), slots)
        mask = np.zeros(shape, bool)
        extra = {name: np.zeros(shape, np.float32) for name in names}
        for row, group in enumerate(groups):
            mask[row, : len(group)] = True
            for slot, which in enumerate(group):
                for name in names:
                    extra[name][row, slot] = pairs[which][name]
        if not packed:
            extra = {name: value[:, 0] for name, value in extra.items()}
        sides = {
            side: tiny.token_batch(
                tiny.lay([pair[side] for pair in pairs], groups, length, left=left)
            )
            for side in ("chosen", "rejected")
        }
        return PairBatch(**sides, **extra, mask=mask if packed else None)

    return batch


def _spoil_pairs(batch, rng):
    exists = batch.chosen.loss_mask.any(axis=1) if batch.mask is None else batch.mask

    def spoil(x):
        return None if x is None else np.where(exists, x, np.float32(np.nan))

    return PairBatch(
        chosen=tiny.spoil(batch.chosen, rng),
        rejected=tiny.spoil(batch.rejected, rng),
        ref_chosen_logps=spoil(batch.ref_chosen_logps),
        ref_rejected_logps=spoil(batch.ref_rejected_logps),
        margin=spoil(batch.margin),
        mask=batch.mask,
    )


# Rollouts: old log-probabilities near those of the policy, so that some ratios are clipped.


def _rollout_documents(rng):
    documents = _documents(rng)
    for one in documents:
        size = len(one["inputs"])
        logprobs, values = rng.uniform(-5.0, -3.5, size), rng.normal(size=size)
        one |= {
            "old_logprobs": logprobs,
            "ref_logprobs": logprobs + 0.3 * rng.normal(size=size),
            "old_values": values,
            "advantages": rng.normal(size=size),
            "returns": values + rng.normal(size=size),
        }
        one |= {k: v.astype(np.float32) for k, v in one.items() if v.dtype == np.float64}
        # One position more than the answer, as score_at="after_eos" has it.
        one["value_mask"] = one["loss_mask"] | np.append(False, one["loss_mask"][:-1])
    return documents


def _rollout_batch(documents, groups, length, left=False):
    rows = tiny.lay(documents, groups, length, left=left)
    fields = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns", "value_mask")
    return RolloutBatch(tokens=tiny.token_batch(rows), **{name: rows[name] for name in fields})


def _spoil_rollout(batch, rng):
    def spoil(x, mask):
        return np.where(mask, x, np.float32(np.nan))

    answer, valued = batch.tokens.loss_mask, batch.value_mask
    return batch._replace(
        tokens=tiny.spoil(batch.tokens, rng),
        old_logprobs=spoil(batch.old_logprobs, answer),
        ref_logprobs=spoil(batch.ref_logprobs, answer),
        advantages=spoil(batch.advantages, answer),
        old_values=spoil(batch.old_values, valued),
        returns=spoil(batch.returns, valued),
    )


SIMPLE = make_optimizer(_OPTIMIZER)
_DPO_READS = ("ref_chosen_logps", "ref_rejected_logps")


def make_cases(decoder, scorer):
    """The four algorithms with these models."""
    return (
        Case(
            "sft",
            decoder.axes,
            decoder.shapes,
            lambda tx, **kw: sft.make_step(decoder, tx, sft.Config(log_entropy=True), **kw),
            SIMPLE,
            _documents,
            _sft_batch,
            tiny.spoil,
        ),
        Case(
            "reward",
            scorer.axes,
            scorer.shapes,
            lambda tx, **kw: reward.make_step(scorer, tx, reward.Config(center_coef=0.05), **kw),
            SIMPLE,
            _pairs,
            _pair_batch(("margin",)),
            _spoil_pairs,
        ),
        Case(
            "dpo",
            decoder.axes,
            decoder.shapes,
            lambda tx, **kw: dpo.make_step(decoder, tx, dpo.Config(label_smoothing=0.1), **kw),
            SIMPLE,
            _pairs,
            _pair_batch(_DPO_READS),
            _spoil_pairs,
        ),
        Case(
            "ppo",
            ppo.init_params(decoder.axes, scorer.axes),
            ppo.init_params(decoder.shapes, scorer.shapes),
            lambda tx, **kw: ppo.make_step(
                decoder,
                scorer,
                tx,
                ppo.Config(temperature=0.9, kl_in="loss", kl_estimator="k3", entropy_coef=0.01),
                **kw,
            ),
            ppo.make_optimizer(SIMPLE, make_optimizer(_OPTIMIZER)),
            _rollout_documents,
            _rollout_batch,
            _spoil_rollout,
        ),
    )


CASES = make_cases(tiny.DECODER, tiny.SCORER)
