"""The configuration of `jaxalign ppo`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms import ppo
from jaxalign.algorithms.optim import OptimizerConfig
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.rewards.specs import RewardSpec
from jaxalign.run.config.base import Run
from jaxalign.run.config.data import DataConfig, want


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPORun(Run):
    """`jaxalign ppo`.

    Attributes:
      ppo: the algorithm's options; by default `stop_tokens` and `pad_token` come from the
        tokenizer.
      reward_model: folder of a reward model with the policy's tokenizer: short for `rewards` with
        only this model.
      rewards: any number of rewards of any kind, whose weighted sum scores answers; docs/rewards.md
        has the kinds and their options.
      reward_weights: attribute → weight, for a reward model with several attributes: the reward is
        the weighted sum. Attributes not named have weight 0.
      reference: the frozen reference; None: the starting policy.
      critic: where the critic starts; None: from the (first) reward model with the policy's
        tokenizer; "policy": from the policy, with a new head; "adapter": separate adapters and a
        head on the base of the policy's adapters (`model.lora`). `reward_weights` also apply to a
        critic with several attributes.
      critic_head: "pretrained" keeps the head of the critic's source (a policy has none, so the
        critic gets a new one); "zero" starts from values of 0. A reward model is trained only on
        whole answers, so its scores within an answer may be worse than 0.
      critic_optimizer: its optimizer; None: the policy's.
      critic_warmup: iterations in which only the critic learns.
      ppo_epochs: passes over each rollout.
      minibatches: updates per pass.
      pack_updates: 0: one answer per row. n: the answers of an update are packed into fewer, longer
        rows, with the smallest of n shapes that holds them; each shape is compiled at its first
        use.
      target_kl: after an update whose `policy/approxkl_avg` is above this, the iteration's
        remaining updates are skipped; None: never.
      stop_kl: in nats per answer; an iteration with a larger |`objective/kl`| ends the run before
        its updates; None: never.
      stop_score: the same for `objective/scores`, the mean score of the answers.
      prompt_draws: the most batches of prompts that an iteration answers in order to replace
        prompts whose answers all have the same score (DAPO's dynamic sampling); needs
        `ppo.skip_equal_groups`, and data that does not end (`data.epochs` null).
      calibrate_reward: "mean" or "mean_std": before the first iteration the reward is shifted (and
        scaled) so that the reference's answers to the first batch of prompts score 0 on average
        (with standard deviation 1); "none": unchanged.
      offload_frozen: keep reward models and the reference in the host's memory except while they
        compute. A reference that is the base under adapters stays on the devices, since the policy
        reads it too.
      ptx: text whose likelihood is added to the loss with weight `ppo.ptx_coef`; the options are
        those of SFT's `data`, and each update reads one batch.
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
    stop_kl: float | None = None
    stop_score: float | None = None
    prompt_draws: int = 1
    calibrate_reward: str = "none"
    offload_frozen: bool = False
    ptx: DataConfig | None = None
    dump_every: int = 0
    dump_samples: int = 4

    algorithm: ClassVar[str] = "ppo"
    models_with_rules: ClassVar[tuple[str, ...]] = ("reference", "reward", "critic", "rollout")
    models_apart: ClassVar[tuple[str, ...]] = ("reference", "reward")

    def __post_init__(self):
        super().__post_init__()
        want(
            not self.data.packing,
            "data.packing",
            self.data.packing,
            "false: prompts for rollouts are not packed",
        )
        self._check_rewards()
        self._check_updates()
        self._check_critic()
        want(self.dump_every >= 0, "dump_every", self.dump_every, "0 or more")
        want(self.dump_samples > 0, "dump_samples", self.dump_samples, "positive")
        want(
            (self.ptx is not None) == (self.ppo.ptx_coef > 0),
            "ptx",
            self.ptx,
            f"data where ppo.ptx_coef is above 0, and nowhere else; it is {self.ppo.ptx_coef}",
        )

    def _check_rewards(self) -> None:
        weights = self.reward_weights
        want(
            weights is None or any(weights.values()),
            "reward_weights",
            weights,
            "a weight other than 0 for at least one attribute, or null",
        )
        want(
            (self.reward_model is None) == bool(self.rewards),
            "reward_model",
            self.reward_model,
            "it, or a list of rewards, and not both",
        )
        want(
            weights is None or self.reward_model is not None,
            "reward_weights",
            weights,
            "null with rewards; a model among them has its own: attributes",
        )
        known = ppo.CALIBRATIONS
        want(
            self.calibrate_reward in known,
            "calibrate_reward",
            self.calibrate_reward,
            f"one of {', '.join(known)}",
        )

    def _check_updates(self) -> None:
        want(self.ppo_epochs > 0, "ppo_epochs", self.ppo_epochs, "positive")
        want(self.minibatches > 0, "minibatches", self.minibatches, "positive")
        want(self.pack_updates >= 0, "pack_updates", self.pack_updates, "0 or more")
        packs = bool(self.pack_updates or self.ppo.pack_experience)
        want(
            packs or not self.ppo.shared_prompts,
            "ppo.shared_prompts",
            True,
            "false without pack_updates and ppo.pack_experience: only packed rows share prompts",
        )
        answers = self.data.rows * self.ppo.samples
        want(
            answers % self.minibatches == 0,
            "minibatches",
            self.minibatches,
            f"a divisor of the {answers} answers of an iteration (data.rows × ppo.samples)",
        )
        want(self.critic_warmup >= 0, "critic_warmup", self.critic_warmup, "0 or more")
        for name in ("target_kl", "stop_kl", "stop_score"):
            value = getattr(self, name)
            want(value is None or value > 0, name, value, "positive or null")
        want(self.prompt_draws > 0, "prompt_draws", self.prompt_draws, "positive")
        if self.prompt_draws > 1:
            skips, epochs = self.ppo.skip_equal_groups, self.data.epochs
            want(
                skips and epochs is None,
                "prompt_draws",
                self.prompt_draws,
                "1, or ppo.skip_equal_groups=true with data.epochs=null; they are "
                f"{skips} and {epochs}",
            )

    def _check_critic(self) -> None:
        heads = ("pretrained", "zero")
        want(self.critic_head in heads, "critic_head", self.critic_head, " or ".join(heads))
        for name, default in (
            ("critic", None),
            ("critic_head", "pretrained"),
            ("critic_optimizer", None),
            ("critic_warmup", 0),
        ):
            value, estimator = getattr(self, name), self.ppo.advantage_estimator
            wanted = "null" if default is None else repr(default)
            want(
                self.ppo.has_critic or value == default,
                name,
                value,
                f"{wanted}, or leave it out: ppo.advantage_estimator={estimator} has no critic",
            )
        want(
            not self.ppo.shared_critic or self.critic is None,
            "critic",
            self.critic,
            "null with ppo.shared_critic: it is a head on the policy",
        )

        want(
            self.model.quantize is None or self.critic != "policy",
            "critic",
            self.critic,
            "adapter, or a model with a score: model.quantize keeps the policy's base in few bits, "
            "which a critic of its own cannot train",
        )
        adapter = self.critic == "adapter"
        want(
            not adapter or self.model.lora is not None,
            "critic",
            self.critic,
            "model.lora with it: the critic's adapters share the frozen base of the policy's",
        )
        want(
            not adapter or "critic" not in self.mesh.rules_of,
            "mesh.rules_of.critic",
            self.mesh.rules_of.get("critic"),
            "none with critic=adapter: the base has one layout",
        )

    def reward_specs(self) -> tuple[RewardSpec, ...]:
        """All rewards, including the short form `reward_model`."""
        if self.reward_model is None:
            return self.rewards
        return (ModelReward(source=self.reward_model, attributes=self.reward_weights),)

    def critic_start(self) -> tuple[str, dict[str, float] | None]:
        """The model that the critic starts from, and the weights of its attributes.

        With `critic` "adapter" it is the policy's base.

        Raises:
          ValueError: none is named, and no reward model has the policy's tokenizer.
        """
        models = [
            spec
            for spec in self.reward_specs()
            if isinstance(spec, ModelReward) and spec.tokenizer == "policy"
        ]
        if self.critic == "adapter":
            return self.model.source, None
        if self.critic is not None:
            return self.critic, models[0].attributes if models else None
        if not models:
            raise ValueError(
                "critic=null: there is no reward model with the policy's tokenizer that it could "
                "start from; set critic: policy (the policy's trunk with a fresh head), name a "
                "model with a score, as `jaxalign reward` makes, or take an estimator without a "
                "critic (ppo.advantage_estimator: rloo, grpo, reinforce++)"
            )
        return models[0].source, models[0].attributes

    @property
    def frozen_models(self) -> dict[str, str]:
        """Also includes the reference and the reward models."""
        start = {"model.source": self.model.source}
        models = start if self.reference is None else {"reference": self.reference}
        if self.reward_model is not None:
            models["reward_model"] = self.reward_model
        for number, spec in enumerate(self.rewards):
            if isinstance(spec, ModelReward):
                models[f"rewards[{number}].source"] = spec.source
        return super().frozen_models | models

    @property
    def sequences(self) -> int:
        """Answers of an iteration."""
        return self.data.rows * self.ppo.samples

    @property
    def sampled(self) -> int:
        """Tokens of the longest answer."""
        return self.ppo.max_new_tokens

    @property
    def row_parts(self) -> dict[str, int]:
        """Also counts the mini-batches."""
        return super().row_parts | {"minibatches": self.minibatches}

    @property
    def text_sections(self) -> dict[str, tuple[DataConfig, int]]:
        """Also includes the `ptx` text."""
        sections = super().text_sections
        if self.ptx is not None:
            sections["ptx"] = (self.ptx, self.run.micro_batches)
        return sections
