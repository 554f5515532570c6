"""What a configuration says of a reward: a frozen dataclass a kind, told apart by `kind`."""

from __future__ import annotations

import dataclasses
import math

from jaxalign.rewards.gsm8k import check_extract
from jaxalign.rewards.ifeval import check_ifeval
from jaxalign.rewards.length import check_length
from jaxalign.rewards.model import check_scale
from jaxalign.rewards.regex import check_regex
from jaxalign.rewards.remote import check_http


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """What all kinds have.

    Attributes:
      kind: which kind.
      name: under which it is logged (`rewards/<name>`); None: its kind.
      weight: of it in the sum; 0 only logs.
      where: column → text: the reward applies only to rows that have these; None: to all.
    """

    kind: str
    name: str | None = None
    weight: float = 1.0
    where: dict[str, str] | None = None

    def __post_init__(self):
        mine = type(self).kind
        _want(self.kind == mine, "kind", self.kind, repr(mine))
        _want(self.name is None or bool(self.name.strip()), "name", self.name, "a name, or null")
        _want(math.isfinite(self.weight), "weight", self.weight, "a finite number")
        _want(self.where is None or bool(self.where), "where", self.where, "a column, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelReward(_Spec):
    """A trained reward model.

    Attributes:
      source: folder or hub id.
      tokenizer: "policy": it has the policy's; "own": it has its own and a template, and answers
        go to it through text (see `retokenised_reward`).
      chat_template: with its own tokenizer: what it was trained under; None: that tokenizer's.
      length: with its own tokenizer: tokens of the longest conversation; None: what the model was
        trained for.
      batch: with its own tokenizer: conversations scored at a time.
      attributes: attribute → weight, for a model with several scores: the weighted sum.
      shift: is subtracted from the score.
      scale: by which that is divided.
    """

    kind: str = "model"
    source: str
    tokenizer: str = "policy"
    chat_template: str | None = None
    length: int | None = None
    batch: int = 16
    attributes: dict[str, float] | None = None
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        known = ("policy", "own")
        _want(self.tokenizer in known, "tokenizer", self.tokenizer, " or ".join(known))
        own = self.tokenizer == "own"
        for name, default in (("chat_template", None), ("length", None), ("batch", 16)):
            value = getattr(self, name)
            _want(own or value == default, name, value, f"{default!r} without tokenizer=own")
        _want(self.length is None or self.length > 1, "length", self.length, "2 or more, or null")
        _want(self.batch > 0, "batch", self.batch, "positive")
        weights = self.attributes
        _want(
            weights is None or any(weights.values()),
            "attributes",
            weights,
            "a weight other than 0 for at least one, or null",
        )
        check_scale(self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionReward(_Spec):
    """A Python function.

    Attributes:
      path: `module:function`, or `file.py:function`; modules are also looked for in the current
        folder.
      calls: "row": as `text_reward` calls it, for each answer; "batch": as `batch_reward`, once.
    """

    kind: str = "function"
    path: str
    calls: str = "row"

    def __post_init__(self):
        super().__post_init__()
        module, _, function = self.path.rpartition(":")
        ok = bool(module) and function.isidentifier()
        _want(ok, "path", self.path, "module:function or file.py:function")
        _want(self.calls in ("row", "batch"), "calls", self.calls, "row or batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8kReward(_Spec):
    """The final number of a calculation; see `jaxalign.rewards.gsm8k`.

    Attributes:
      extract: "strict" or "flexible".
      column: where the row has the right answer.
      format_score: for a number that is not the right one.
    """

    kind: str = "gsm8k"
    extract: str = "strict"
    column: str = "answer"
    format_score: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_extract(self.extract)
        ok = math.isfinite(self.format_score)
        _want(ok, "format_score", self.format_score, "a finite number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IfevalReward(_Spec):
    """Constraints; see `jaxalign.rewards.ifeval`.

    Attributes:
      mode: "strict" or "loose".
      per: "instruction" or "prompt".
    """

    kind: str = "ifeval"
    mode: str = "strict"
    per: str = "instruction"

    def __post_init__(self):
        super().__post_init__()
        check_ifeval(self.mode, self.per)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegexReward(_Spec):
    """A regular expression; see `jaxalign.rewards.regex`.

    Attributes:
      pattern: Python's form.
      how: "search" or "fullmatch".
      column: the row's column that what matched must be equal to; None: a match is enough.
    """

    kind: str = "regex"
    pattern: str
    how: str = "search"
    column: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_regex(self.pattern, self.how)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthReward(_Spec):
    """The number of tokens; see `jaxalign.rewards.length`.

    Attributes:
      longest: tokens after which the punishment is full.
      cache: tokens before that over which it grows.
      target: wanted tokens, in place of `longest`.
      width: tokens off the target at which the punishment is full; None: `target`.
    """

    kind: str = "length"
    longest: int | None = None
    cache: int = 0
    target: int | None = None
    width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_length(self.longest, self.cache, self.target, self.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpReward(_Spec):
    """A server; see `jaxalign.rewards.remote`.

    Attributes:
      url: http or https.
      timeout: seconds for a request.
      max_failures: failures of a request in a row that stop the run.
      backoff: seconds of the longest first pause before another try.
      batch: answers in a request.
      concurrency: requests at a time.
      seed: of the pauses.
      key_variable: environment variable with a key; None: no key.
    """

    kind: str = "http"
    url: str
    timeout: float = 30.0
    max_failures: int = 5
    backoff: float = 1.0
    batch: int = 16
    concurrency: int = 4
    seed: int = 0
    key_variable: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_http(
            self.url, self.timeout, self.max_failures, self.backoff, self.batch, self.concurrency
        )


RewardSpec = (
    ModelReward
    | FunctionReward
    | Gsm8kReward
    | IfevalReward
    | RegexReward
    | LengthReward
    | HttpReward
)


def _want(ok: bool, name: str, got: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={got!r}: wanted {wanted}")
