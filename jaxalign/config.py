"""A run's configuration: YAML and `key=value` overrides → frozen dataclasses that check themselves.

Every option is a field of one dataclass below or of an algorithm's `Config`; a key that is no
field is an error that names the nearest one. Nothing else reads YAML, and no default hides
anywhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml

from jaxalign.algorithms import dpo, kto, ppo, reward, sft
from jaxalign.algorithms.reference import ReferenceSync
from jaxalign.config_data import DataConfig
from jaxalign.config_data import want as _want
from jaxalign.models.decoder import REMAT
from jaxalign.models.lora import LoraConfig
from jaxalign.optim import OptimizerConfig

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
      remat: "none", "dots" or "block": what the backward pass recomputes.
      lora: adapters; None trains all weights.
    """

    source: str
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    compute_dtype: str | None = None
    remat: str = "none"
    lora: LoraConfig | None = None

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh; one may be -1, "the rest"."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


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
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
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
    """

    dpo: dpo.Config = dpo.Config()
    reference: str | None = None
    reference_cache: str | None = None
    reference_sync: ReferenceSync | None = None

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
        _check_sync(self.reference_sync, self.reference, self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTORun(_Run):
    """`jaxalign kto`.

    Attributes:
      kto: the algorithm's options.
      reference: the frozen reference model; None: the starting model itself.
      reference_sync: let the reference follow the policy; None: it stays.
    """

    kto: kto.Config = kto.Config()
    reference: str | None = None
    reference_sync: ReferenceSync | None = None

    def __post_init__(self):
        super().__post_init__()
        _want(not self.data.packing, "data.packing", True, "false: KTO's answers are not packed")
        _check_sync(self.reference_sync, self.reference, self.model)


def _check_sync(sync: ReferenceSync | None, reference: str | None, model: ModelConfig) -> None:
    _want(
        sync is None or reference is None or model.lora is None,
        "reference_sync",
        sync,
        "null with both a reference and model.lora: adapters cannot be moved towards whole weights",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPORun(_Run):
    """`jaxalign ppo`.

    Attributes:
      ppo: the algorithm's options; `stop_tokens` and `pad_token` come from the tokenizer where they
        are left at their defaults.
      reward_model: folder of a reward model with the policy's tokenizer.
      reward_weights: attribute → weight, for a reward model with several attributes: the reward is
        the weighted sum. Those not named weigh 0.
      reference: the frozen reference; None: the starting policy.
      critic: where the critic starts; None: from the reward model. One with several attributes is
        weighed by `reward_weights` too.
      critic_head: "pretrained" keeps the head that the critic came with; "zero" starts from values
        of 0. A reward model has learned to read whole answers only, so that its scores in the
        middle of one may be worse than none.
      critic_optimizer: its optimizer; None: the policy's.
      ppo_epochs: passes over each rollout.
      minibatches: updates a pass.
    """

    reward_model: str
    ppo: ppo.Config = ppo.Config()
    reward_weights: dict[str, float] | None = None
    reference: str | None = None
    critic: str | None = None
    critic_head: str = "pretrained"
    critic_optimizer: OptimizerConfig | None = None
    ppo_epochs: int = 4
    minibatches: int = 1

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
        _want(self.ppo_epochs > 0, "ppo_epochs", self.ppo_epochs, "positive")
        _want(self.minibatches > 0, "minibatches", self.minibatches, "positive")
        _want(
            self.data.rows % self.minibatches == 0,
            "minibatches",
            self.minibatches,
            f"a divisor of data.rows={self.data.rows}",
        )
        _want(self.model.lora is None, "model.lora", self.model.lora, "null in PPO")


RUNS: dict[str, type[_Run]] = {
    "sft": SFTRun,
    "reward": RewardRun,
    "dpo": DPORun,
    "kto": KTORun,
    "ppo": PPORun,
}
"""Command → what its YAML describes."""


def read_yaml(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
      ValueError: no such file, broken YAML (with the line), or no mapping.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"config {str(path)!r}: no such file")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"config {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config {path}: wanted 'key: value' lines, got {type(loaded).__name__}")
    return loaded


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that would be read as a number is put in quotes."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a float, so that a plain 1e-5 would be a string.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=value` assignments, whose values are YAML, to nested values.

    Raises:
      ValueError: not of the form `key=value`, or a key inside something that is no section.
    """
    result = _copy(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ValueError(f"override {assignment!r}: wanted key=value, e.g. data.rows=8")
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ValueError(f"override {assignment!r}: {parent!r} is no section")
            node = child
        try:
            node[leaf] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"override {assignment!r}: {error}") from error
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of `over` on top."""
    result = _copy(base)
    for key, value in over.items():
        inner = result.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            result[key] = merge(inner, value)
        else:
            result[key] = _copy(value) if isinstance(value, Mapping) else value
    return result


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


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


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Nested values → a dataclass, with every problem collected into one error."""
    problems: list[str] = []
    built = _build(cls, values, "", problems)
    if problems:
        raise ValueError("config:\n  " + "\n  ".join(problems))
    return built


def to_values(config: Any) -> Any:
    """A dataclass → plain nested values for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_values(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {name: to_values(value) for name, value in config.items()}
    return [to_values(v) for v in config] if isinstance(config, (tuple, list)) else config


def write_yaml(path: str | pathlib.Path, config: Any) -> None:
    """Writes a resolved configuration."""
    text = yaml.dump(to_values(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    pathlib.Path(path).write_text(text, encoding="utf-8")


def _build(cls: Any, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where.rstrip('.') or 'top level'}: wanted a section, got {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    arguments = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, 0.5)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(fields)}"
            problems.append(f"{name}: unknown key; {hint}")
            continue
        arguments[key] = _convert(hints[key], value, name, problems)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and (
            field.default_factory is dataclasses.MISSING
        )
        if required and key not in values:
            problems.append(f"{where}{key}: missing")
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:
        problems.append(f"{where.rstrip('.') or cls.__name__}: {error}")
        return None


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """One value of the annotated type, or a problem."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        fitting = [h for h in options if _fits(h, value)]
        return _convert((fitting or options)[0], value, name, problems)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.", problems)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        inner = typing.get_args(hint)[0]
        return tuple(
            _convert(inner, item, f"{name}[{i}]", problems) for i, item in enumerate(items)
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{name}: wanted a section, got {value!r}")
            return value
        inner = typing.get_args(hint)[1]
        return {str(k): _convert(inner, v, f"{name}.{k}", problems) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, pathlib.Path):
        return str(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        problems.append(f"{name}: wanted {hint.__name__}, got {value!r}")
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of one of several types that an option may have."""
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple))
    return isinstance(hint, type) and isinstance(value, hint)
