"""A run's configuration: frozen dataclasses that check themselves.

Every option is a field of one dataclass below or of an algorithm's `Config`, and no default hides
anywhere else. `config_yaml` builds them from YAML and `key=value` overrides.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from jaxalign.algorithms import dpo, kto, ppo, reward, sft
from jaxalign.algorithms.moving_reference import ReferenceSync
from jaxalign.algorithms.optim import OptimizerConfig
from jaxalign.models.attention.dispatch import KINDS
from jaxalign.models.decoder import REMAT
from jaxalign.models.lora import LoraConfig
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.rewards.specs import RewardSpec
from jaxalign.run.config.data import DataConfig
from jaxalign.run.config.data import want as _want
from jaxalign.run.config.mesh import MeshConfig
from jaxalign.run.config.reference import check_offload, check_sync
from jaxalign.run.config.yaml import build, override, read_yaml

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is held.

    Attributes:
      source: folder in Hugging Face form, `.gguf` file, or hub id.
      tokenizer: where the tokenizer is; None: with the model.
      chat_template: None (the tokenizer's own), the name of a built-in template ("chatml"), "none"
        (plain text), or a jinja file.
      dtype: of the master weights.
      compute_dtype: of activations; None: bfloat16 on GPU and TPU, float32 on CPU.
      remat: "none", "dots", "block" or "offload": what the backward pass recomputes, see
        `jaxalign.models.decoder.REMAT`.
      lora: adapters; None trains all weights.
      attention: "auto" (by backend), "xla", "splash" (TPU) or "cudnn" (NVIDIA); a kernel gives way
        to "xla" where it does not cover the case.
    """

    source: str
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    compute_dtype: str | None = None
    remat: str = "none"
    lora: LoraConfig | None = None
    attention: str = "auto"

    def __post_init__(self):
        floats, names = ("float32", "bfloat16", "float16"), ", ".join
        _want(self.dtype in floats, "model.dtype", self.dtype, f"one of {names(floats)}")
        _want(
            self.compute_dtype is None or self.compute_dtype in floats,
            "model.compute_dtype",
            self.compute_dtype,
            f"one of {names(floats)}, or null",
        )
        _want(self.remat in REMAT, "model.remat", self.remat, f"one of {names(REMAT)}")
        kinds = f"one of {names(KINDS)}"
        _want(self.attention in KINDS, "model.attention", self.attention, kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, and when.

    Attributes:
      folder: the run's folder: `metrics.jsonl`, `config.yaml`, `versions.json`, `checkpoints/`,
        and the final weights in `model/`.
      seed: of every random choice.
      steps: batches to train on (iterations, in PPO); None: until the data ends.
      micro_batches: parts a batch is computed in, one after the other.
      log_every: steps between lines on the terminal; every step is in `metrics.jsonl`.
      eval_every: batches between evaluations; 0: at the start and end only.
      save_every: batches between checkpoints; 0: at the end only.
      keep: checkpoints kept.
      resume: continue from the newest checkpoint in `folder`.
      export: write the final weights in Hugging Face form to `folder/model`.
      checkpoint: write checkpoints at all.
    """

    folder: str
    seed: int = 0
    steps: int | None = None
    micro_batches: int = 1
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    resume: bool = False
    export: bool = True
    checkpoint: bool = True

    def __post_init__(self):
        _want(self.steps is None or self.steps > 0, "run.steps", self.steps, "positive or null")
        _want(self.micro_batches > 0, "run.micro_batches", self.micro_batches, "positive")
        _want(self.log_every > 0, "run.log_every", self.log_every, "positive")
        _want(self.eval_every >= 0, "run.eval_every", self.eval_every, "0 or more")
        _want(self.save_every >= 0, "run.save_every", self.save_every, "0 or more")
        _want(self.keep > 0, "run.keep", self.keep, "positive")
        for name in ("resume", "save_every"):
            value = getattr(self, name)
            _want(self.checkpoint or not value, f"run.{name}", value, "run.checkpoint=true with it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    # Models besides the one that is trained, which these options of `mesh` may name.
    models_with_rules: ClassVar[tuple[str, ...]] = ()
    models_apart: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for option, known in (("rules_of", self.models_with_rules), ("apart", self.models_apart)):
            for name, value in getattr(self.mesh, option).items():
                wanted = f"one of {', '.join(known)}" if known else "none of it in this algorithm"
                _want(name in known, f"mesh.{option}.{name}", value, wanted)
        _want(
            self.data.epochs is not None or self.run.steps is not None,
            "run.steps",
            None,
            "a number of steps when data.epochs is null",
        )
        _want(
            not self.data.streaming or self.run.steps is not None,
            "run.steps",
            None,
            "a number of steps with data.streaming, where the number of rows is unknown",
        )
        held_out = bool(self.data.eval) or self.data.validation is not None
        _want(
            held_out or not self.run.eval_every,
            "run.eval_every",
            self.run.eval_every,
            "0 without data.eval or data.validation",
        )
        for name, runs, default in (
            ("train_on", SFTRun, "all"),
            ("shared_prefix", (RewardRun, DPORun), False),
        ):
            value = getattr(self.data, name)
            _want(
                value == default or isinstance(self, runs),
                f"data.{name}",
                value,
                f"{default!r}: this algorithm has no use for it",
            )
        _want(
            self.data.packing != "wrapped" or isinstance(self, SFTRun),
            "data.packing",
            self.data.packing,
            "true or false: only SFT's plain texts may be cut where a row ends",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRun(_Run):
    """`jaxalign sft`."""

    sft: sft.Config = sft.Config()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRun(_Run):
    """`jaxalign reward`.

    The model may be a base model, a fine-tuned one, or another reward model.

    Attributes:
      head: "pretrained" goes on with the head of a reward model (a language model has none and gets
        a fresh one); "fresh" keeps a reward model's body only, for another objective.
      answers: of a ranking: the most answers that a prompt may have; None: as many as any has.
    """

    reward: reward.Config = reward.Config()
    head: str = "pretrained"
    answers: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _want(self.head in ("pretrained", "fresh"), "head", self.head, "pretrained or fresh")
        objective, answers = self.reward.objective, self.answers
        _want(answers is None or answers > 1, "answers", answers, "at least 2, or null")
        _want(
            answers is None or objective == "ranking",
            "answers",
            answers,
            "null, or reward.objective=ranking",
        )
        for name in ("packing", "shared_prefix"):
            _want(
                not getattr(self.data, name) or objective == "pairs",
                f"data.{name}",
                getattr(self.data, name),
                f"false with reward.objective={objective}: its rows hold one answer each",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPORun(_Run):
    """`jaxalign dpo`.

    Attributes:
      dpo: the algorithm's options.
      reference: the frozen reference model; None: the starting model itself.
      reference_cache: folder for the reference's log-probabilities of all pairs, computed before
        training if they are not there, and then used in place of the reference, which is not held
        beside the policy. None: the reference is asked for every batch.
      reference_sync: let the reference follow the policy; None: it stays.
      offload_frozen: keep the reference in the host's memory but while it is asked.
    """

    dpo: dpo.Config = dpo.Config()
    reference: str | None = None
    reference_cache: str | None = None
    reference_sync: ReferenceSync | None = None
    offload_frozen: bool = False

    models_with_rules: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self):
        super().__post_init__()
        dpo.check_micro_batches(self.dpo, self.run.micro_batches)
        for name in ("reference", "reference_cache", "reference_sync"):
            value, loss_type = getattr(self, name), self.dpo.loss_type
            _want(
                self.dpo.has_reference or value is None,
                name,
                value,
                f"null: dpo.loss_type={loss_type!r} has no reference",
            )
        _want(
            self.reference_cache is None or self.reference_sync is None,
            "reference_cache",
            self.reference_cache,
            "null with reference_sync, under which the reference changes",
        )
        check_sync(self)
        held = self.dpo.has_reference and self.reference_cache is None
        check_offload(self, held=held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTORun(_Run):
    """`jaxalign kto`.

    Attributes:
      kto: the algorithm's options.
      reference: the frozen reference model; None: the starting model itself.
      reference_sync: let the reference follow the policy; None: it stays.
      offload_frozen: keep the reference in the host's memory but while it is asked.
    """

    kto: kto.Config = kto.Config()
    reference: str | None = None
    reference_sync: ReferenceSync | None = None
    offload_frozen: bool = False

    models_with_rules: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self):
        super().__post_init__()
        _want(not self.data.packing, "data.packing", True, "false: KTO's answers are not packed")
        check_sync(self)
        check_offload(self, held=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPORun(_Run):
    """`jaxalign ppo`.

    Attributes:
      ppo: the algorithm's options; `stop_tokens` and `pad_token` come from the tokenizer where they
        are left at their defaults.
      reward_model: folder of a reward model with the policy's tokenizer: short for `rewards` with
        this one alone.
      rewards: what scores answers, of any kind, added up with their weights; docs/rewards.md has
        the kinds and their options.
      reward_weights: attribute → weight, for a reward model with several attributes: the reward is
        the weighted sum. Those not named weigh 0.
      reference: the frozen reference; None: the starting policy.
      critic: where the critic starts; None: from the (first) reward model with the policy's
        tokenizer; "policy": from the policy, with a fresh head. One with several attributes is
        weighed by `reward_weights` too.
      critic_head: "pretrained" keeps the head that the critic came with (a policy has none, and its
        critic gets a fresh one); "zero" starts from values of 0. A reward model has learned to read
        whole answers only, so that its scores in the middle of one may be worse than none.
      critic_optimizer: its optimizer; None: the policy's.
      critic_warmup: iterations in which only the critic learns.
      ppo_epochs: passes over each rollout.
      minibatches: updates a pass.
      pack_updates: 0: an answer a row. n: the answers of an update are packed into fewer, longer
        rows, of the smallest of n sizes that takes them; each size is compiled when it first comes.
      target_kl: once an update has measured a `policy/approxkl_avg` above this, the rest of the
        iteration's updates are left out; None: never.
      prompt_draws: batches of prompts that an iteration has answered, at most, until the places of
        prompts whose answers all score alike are filled (DAPO's dynamic sampling); wants
        `ppo.skip_equal_groups`, and data that does not end (`data.epochs` null).
      calibrate_reward: "mean" or "mean_std": before the first iteration the reward is shifted (and
        scaled) so that the reference's answers to the first batch of prompts score 0 on average
        (with standard deviation 1); "none": as it is.
      offload_frozen: keep reward models and the reference in the host's memory but while they are
        asked. A reference that is the base under adapters stays, since the policy reads it too.
      ptx: text whose likelihood joins the loss with weight `ppo.ptx_coef`: data as SFT has them,
        one batch an update.
      dump_every: iterations between samples in `rollouts.jsonl` and histograms in
        `histograms.jsonl`; 0: none.
      dump_samples: answers in each such sample.
    """

    reward_model: str | None = dataclasses.field(default=None, metadata={"unless": "rewards"})
    rewards: tuple[RewardSpec, ...] = ()
    ppo: ppo.Config = ppo.Config()
    reward_weights: dict[str, float] | None = None
    reference: str | None = None
    critic: str | None = None
    critic_head: str = "pretrained"
    critic_optimizer: OptimizerConfig | None = None
    critic_warmup: int = 0
    ppo_epochs: int = 4
    minibatches: int = 1
    pack_updates: int = 0
    target_kl: float | None = None
    prompt_draws: int = 1
    calibrate_reward: str = "none"
    offload_frozen: bool = False
    ptx: DataConfig | None = None
    dump_every: int = 0
    dump_samples: int = 4

    models_with_rules: ClassVar[tuple[str, ...]] = ("reference", "reward", "critic", "rollout")
    models_apart: ClassVar[tuple[str, ...]] = ("reference", "reward")

    def __post_init__(self):
        super().__post_init__()
        heads = ("pretrained", "zero")
        _want(self.critic_head in heads, "critic_head", self.critic_head, " or ".join(heads))
        weights = self.reward_weights
        _want(
            weights is None or any(weights.values()),
            "reward_weights",
            weights,
            "a weight other than 0 for at least one attribute, or null",
        )
        _want(
            (self.reward_model is None) == bool(self.rewards),
            "reward_model",
            self.reward_model,
            "it, or a list of rewards, and not both",
        )
        _want(
            weights is None or self.reward_model is not None,
            "reward_weights",
            weights,
            "null with rewards; a model among them has its own: attributes",
        )
        _want(self.ppo_epochs > 0, "ppo_epochs", self.ppo_epochs, "positive")
        _want(self.minibatches > 0, "minibatches", self.minibatches, "positive")
        _want(self.pack_updates >= 0, "pack_updates", self.pack_updates, "0 or more")
        answers = self.data.rows * self.ppo.samples
        _want(
            answers % self.minibatches == 0,
            "minibatches",
            self.minibatches,
            f"a divisor of the {answers} answers of an iteration (data.rows × ppo.samples)",
        )
        _want(self.critic_warmup >= 0, "critic_warmup", self.critic_warmup, "0 or more")
        _want(
            self.target_kl is None or self.target_kl > 0,
            "target_kl",
            self.target_kl,
            "positive or null",
        )
        _want(self.prompt_draws > 0, "prompt_draws", self.prompt_draws, "positive")
        if self.prompt_draws > 1:
            skips, epochs = self.ppo.skip_equal_groups, self.data.epochs
            _want(
                skips and epochs is None,
                "prompt_draws",
                self.prompt_draws,
                "1, or ppo.skip_equal_groups=true with data.epochs=null; they are "
                f"{skips} and {epochs}",
            )
        known = ppo.CALIBRATIONS
        _want(
            self.calibrate_reward in known,
            "calibrate_reward",
            self.calibrate_reward,
            f"one of {', '.join(known)}",
        )
        _want(self.dump_every >= 0, "dump_every", self.dump_every, "0 or more")
        _want(self.dump_samples > 0, "dump_samples", self.dump_samples, "positive")
        _want(
            (self.ptx is not None) == (self.ppo.ptx_coef > 0),
            "ptx",
            self.ptx,
            f"data where ppo.ptx_coef is above 0, and nowhere else; it is {self.ppo.ptx_coef}",
        )
        self._check_critic()

    def _check_critic(self) -> None:
        for name, default in (
            ("critic", None),
            ("critic_head", "pretrained"),
            ("critic_optimizer", None),
            ("critic_warmup", 0),
        ):
            value, estimator = getattr(self, name), self.ppo.advantage_estimator
            _want(
                self.ppo.has_critic or value == default,
                name,
                value,
                f"{default!r}: ppo.advantage_estimator={estimator} has no critic",
            )
        _want(
            not self.ppo.shared_critic or self.critic is None,
            "critic",
            self.critic,
            "null with ppo.shared_critic: it is a head on the policy",
        )

    def reward_specs(self) -> tuple[RewardSpec, ...]:
        """All that scores answers, the short form among it."""
        if self.reward_model is None:
            return self.rewards
        return (ModelReward(source=self.reward_model, attributes=self.reward_weights),)

    def critic_start(self) -> tuple[str, dict[str, float] | None]:
        """The model that the critic starts from, and the weights of its attributes.

        Raises:
          ValueError: none is named, and no reward model has the policy's tokenizer.
        """
        models = [
            spec
            for spec in self.reward_specs()
            if isinstance(spec, ModelReward) and spec.tokenizer == "policy"
        ]
        if self.critic is not None:
            return self.critic, models[0].attributes if models else None
        if not models:
            raise ValueError(
                "critic=None: there is no reward model with the policy's tokenizer that it could "
                "start from; name a model with a score, as `jaxalign reward` makes"
            )
        return models[0].source, models[0].attributes


RUNS: dict[str, type[_Run]] = {
    "sft": SFTRun,
    "reward": RewardRun,
    "dpo": DPORun,
    "kto": KTORun,
    "ppo": PPORun,
}
"""Command → what its YAML describes."""


def load_config(
    algorithm: str, source: str | pathlib.Path | Mapping[str, Any], assignments: Sequence[str] = ()
) -> Any:
    """The checked configuration of one run.

    Args:
      algorithm: "sft", "reward", "dpo", "kto" or "ppo".
      source: YAML file, or nested values.
      assignments: `key=value` overrides.

    Raises:
      ValueError: all problems at once: unknown keys (with the nearest valid one), missing keys,
        values of a wrong type or out of range.
    """
    if algorithm not in RUNS:
        raise ValueError(f"algorithm={algorithm!r}: wanted one of {', '.join(RUNS)}")
    values = source if isinstance(source, Mapping) else read_yaml(source)
    return build(RUNS[algorithm], override(values, assignments))


def algorithm_of(values: Mapping[str, Any], remedy: str) -> str:
    """Which algorithm a YAML is for: the one whose section it has.

    Args:
      values: nested values.
      remedy: what to do where it cannot be told, for the message.

    Raises:
      ValueError: no section of an algorithm, several, or a pipeline.
    """
    found = [name for name in RUNS if name in values]
    if len(found) == 1:
        return found[0]
    if "stages" in values:
        raise ValueError("config: this is a pipeline; give the YAML of one of its stages")
    got = " and ".join(found) if found else "no section of an algorithm"
    raise ValueError(f"config: got {got}, so the algorithm is not known; {remedy}")
