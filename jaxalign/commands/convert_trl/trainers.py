"""Rules for the arguments of single trainers: DPO's reference, rollouts of PPO and relatives."""

from __future__ import annotations

from typing import Any

from jaxalign.commands.convert_trl.conversion import Conversion
from jaxalign.commands.convert_trl.rules import SOURCE, convert_length

_AGGREGATION = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
_GROUP_SCALE = {True: "group", False: "none", "True": "group", "False": "none"}


def convert_trainer(c: Conversion) -> None:
    """One trainer's own arguments, and the length of the run: in PPO a step is an iteration."""
    _RULES[c.trainer](c)


def _sft(c: Conversion) -> None:
    convert_length(c)
    kind = c.take("loss_type", "nll")
    if kind not in ("nll", "dft"):
        c.note(f"loss_type: {kind!r}", "nll or dft; nll is used")
        kind = "nll"
    c.put("sft.loss_type", kind)


def _reward(c: Conversion) -> None:
    convert_length(c)
    c.put("reward.center_coef", c.number("center_rewards_coefficient", 0.0))


def _dpo(c: Conversion) -> None:
    convert_length(c)
    types = c.take("loss_type")
    types = [types] if isinstance(types, str) else list(types)
    c.put("dpo.loss_type", types[0] if len(types) == 1 else types)
    c.put("dpo.beta", c.number("beta"))
    # An option without effect on the loss is an error here, so leave out TRL's defaults.
    for name, option, default in (
        ("label_smoothing", "dpo.label_smoothing", 0.0),
        ("ld_alpha", "dpo.ld_alpha", None),
        ("discopop_tau", "dpo.discopop_tau", 0.05),
        ("f_alpha_divergence_coef", "dpo.f_alpha", 0.5),
    ):
        value = c.number(name, default)
        if value != default:
            c.put(option, value)
    divergence = str(c.take("f_divergence_type", "reverse_kl")).rpartition(".")[2].lower()
    if divergence != "reverse_kl":
        c.put("dpo.f_divergence", divergence)
    weights = c.take("loss_weights")
    if weights is not None:
        c.put("dpo.loss_weights", weights)
    if c.take("use_weighting"):
        c.put("dpo.wpo_weighting", True)
    if c.take("precompute_ref_log_probs"):
        c.put("reference_cache", f"{c.values['run']['folder']}-reference")
    c.take("precompute_ref_batch_size")
    _moving_reference(c)


def _kto(c: Conversion) -> None:
    convert_length(c)
    c.put("kto.beta", c.number("beta"))
    kind = c.take("loss_type", "kto")
    if kind != "kto":
        c.note(f"loss_type: {kind!r}", "kto is used; dpo.loss_type has apo_zero for pairs")
    c.take("train_sampling_strategy")
    _moving_reference(c)


def _moving_reference(c: Conversion) -> None:
    alpha, every = c.number("ref_model_mixup_alpha", 0.6), c.number("ref_model_sync_steps", 512)
    if c.take("sync_ref_model"):
        c.put("reference_sync", {"every": every, "alpha": alpha})


def _ppo(c: Conversion) -> None:
    rows, parts = c.number("per_device_train_batch_size"), c.number("gradient_accumulation_steps")
    batch, minibatches = rows * parts * c.processes, c.number("num_mini_batches")
    epochs, episodes = c.number("num_ppo_epochs"), c.number("total_episodes")
    c.put("data.rows", batch)
    c.put("minibatches", minibatches)
    c.put("ppo_epochs", epochs)
    if parts // minibatches > 1:
        c.put("run.micro_batches", parts // minibatches)
    if episodes is None:
        convert_length(c)
    else:
        c.take("max_steps")
        c.take("num_train_epochs")
        c.put("run.steps", -(-episodes // batch))
        c.put("data.epochs", None)
    model = c.take("reward_model_path")
    if model is None:
        c.note("reward_model", f"the file names none; write it in place of {SOURCE}")
    c.put("reward_model", SOURCE if model is None else model)
    c.put("ppo.max_new_tokens", c.number("response_length"))
    ids = c.number("stop_token_id")
    if ids is not None:
        c.put("ppo.stop_tokens", [ids])
    c.take("stop_token")  # "eos" is among those that end an answer anyway
    c.put("ppo.score_at", "after_eos")
    c.put("ppo.whiten_ddof", 1)
    c.leave("num_sample_generations", "dump_every: N writes samples every N iterations")
    for name in ("local_rollout_forward_batch_size", "world_size", "num_total_batches"):
        c.take(name)
    for name in ("kl_coef", "temperature", "vf_coef", "gamma", "lam"):
        c.put(f"ppo.{name}", c.number(name))
    c.put("ppo.kl_estimator", c.take("kl_estimator"))
    c.put("ppo.whiten_rewards", c.take("whiten_rewards"))
    c.put("ppo.clip_range", c.number("cliprange"))
    c.put("ppo.clip_range_value", c.number("cliprange_value"))


def _grpo(c: Conversion) -> None:
    _groups(c, "grpo")
    kind = str(c.take("loss_type"))
    if kind not in _AGGREGATION:
        c.note(f"loss_type: {kind!r}", f"{', '.join(_AGGREGATION)} are known; dapo is used")
    c.put("ppo.loss_aggregation", _AGGREGATION.get(kind, "token"))
    scale = c.take("scale_rewards")
    c.put("ppo.scale_rewards", _GROUP_SCALE.get(scale, scale))
    c.put("ppo.kl_in", "loss")
    c.put("ppo.kl_estimator", "k3")
    c.put("ppo.whiten_ddof", 1)  # an unbiased standard deviation of a group
    _clip(c)
    delta = c.number("delta")
    if delta is not None:
        c.put("ppo.dual_clip", delta)


def _rloo(c: Conversion) -> None:
    _groups(c, "rloo")
    c.put("ppo.loss_aggregation", "constant")
    c.put("ppo.kl_in", "reward")
    c.put("ppo.whiten_advantages", bool(c.take("normalize_advantages")))
    _clip(c)
    bounds = c.take("reward_clip_range")
    if bounds is not None:
        low, high = bounds
        if -low == high:
            c.put("ppo.reward_clip", high)
        else:
            c.note(f"reward_clip_range: {bounds}", "ppo.reward_clip is one bound, ± that number")


def _clip(c: Conversion) -> None:
    low, high = c.number("epsilon"), c.number("epsilon_high")
    c.put("ppo.clip_range", low)
    if high is not None and high != low:
        c.put("ppo.clip_range_high", high)


def _groups(c: Conversion, estimator: str) -> None:
    """Rollouts with several answers per prompt: TRL counts answers, `data.rows` counts prompts."""
    samples, accumulated = c.number("num_generations"), c.number("gradient_accumulation_steps")
    at_once = c.number("per_device_train_batch_size") * c.processes
    answers = c.number("generation_batch_size")
    steps = c.number("steps_per_generation", accumulated)
    answers = at_once * steps if answers is None else answers
    if answers % samples:
        raise ValueError(
            f"a rollout of {answers} answers does not divide into groups of num_generations="
            f"{samples}; give the number of devices of the run with --processes"
        )
    updates = max(1, answers // (at_once * accumulated))
    epochs = c.number("num_iterations")
    c.put("data.rows", answers // samples)
    c.put("ppo_epochs", epochs)
    c.put("minibatches", updates)
    if accumulated > 1:
        c.put("run.micro_batches", accumulated)
    convert_length(c, updates * epochs)
    c.put("ppo.advantage_estimator", estimator)
    c.put("ppo.samples", samples)
    c.put("ppo.max_new_tokens", c.number("max_completion_length"))
    c.put("ppo.temperature", c.number("temperature"))
    c.put("ppo.kl_coef", c.number("beta"))
    if c.take("log_completions"):
        c.put("dump_every", c.number("logging_steps"))
    c.put("rewards", _rewards(c))


def _rewards(c: Conversion) -> list[dict[str, Any]]:
    """`reward_funcs` and the model as entries of `rewards`."""
    functions = c.take("reward_funcs", [])
    functions = [functions] if isinstance(functions, str) else list(functions)
    model = c.take("reward_model_name_or_path")
    weights = list(c.take("reward_weights", []))
    found: list[dict[str, Any]] = []
    for index, name in enumerate([*([model] if model else []), *functions]):
        module, dot, function = str(name).rpartition(".")
        if name == model:
            entry: dict[str, Any] = {"kind": "model", "source": name, "tokenizer": "own"}
        elif dot:
            entry = {"kind": "function", "path": f"{module}:{function}", "calls": "batch"}
        else:
            c.note(f"reward_funcs: {name}", "TRL's own; name a function of yours: module.function")
            continue
        if index < len(weights):
            entry["weight"] = float(weights[index])
        found.append(entry)
    if not found:
        c.note("rewards", f"the file names none; write them in place of {SOURCE}")
        found = [{"kind": "model", "source": SOURCE}]
    return found


_RULES = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "kto": _kto,
    "ppo": _ppo,
    "grpo": _grpo,
    "rloo": _rloo,
}
