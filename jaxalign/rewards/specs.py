"""Rewards by name: one frozen dataclass per `kind`, registered in one table.

A kind is one class, in one file: its fields are the options of a `rewards:` entry, `__post_init__`
checks them, and `build` makes the reward function. `register_reward` adds the class to the table
that the YAML parser and `build_reward` use. Code outside this package registers a kind in the same
way:

    @register_reward
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Brevity(RewardSpec):
        kind: str = "brevity"
        limit: int = 100

        def build(self, context):
            def is_short(prompt, completion):
                return float(len(completion) < self.limit)

            return text_reward(is_short, context.tok, rows=context.rows, name=context.name)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from jaxalign.rewards.cases import Rows
from jaxalign.types import Params, PromptBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxalign.models.scorer import Scorer

RewardFunction = Callable[[TokenBatch, PromptBatch], Any]
"""`(prompts with answers, prompts) -> scores [B]`."""

_KINDS: dict[str, type[RewardSpec]] = {}

S = TypeVar("S", bound="type[RewardSpec]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What the run passes to a spec's `build`.

    Attributes:
      tok: the policy's tokenizer.
      rows: the data rows behind the prompts, see `jaxalign.rewards.text_reward`; None: no rows.
      name: the reward's name in logs and errors.
      load: loads a reward model with one score; None: onto the default device.
      chat_template: the policy's; None: its tokenizer's.
    """

    tok: PreTrainedTokenizerBase
    rows: Any
    name: str
    load: Callable[[Any], tuple[Scorer, Params]] | None = None
    chat_template: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """Options that all kinds share. Subclasses give `kind` a default and override `build`.

    Attributes:
      kind: the key under which the class is registered.
      name: logged as `rewards/<name>`; None: the kind.
      weight: factor in the weighted sum; 0 only logs.
      where: column → text: the reward applies only to rows with these values; None: to all rows.
    """

    kind: str
    name: str | None = None
    weight: float = 1.0
    where: dict[str, str] | None = None

    def __post_init__(self):
        kind = type(self).kind
        check_option(self.kind == kind, "kind", self.kind, repr(kind))
        named = self.name is None or bool(self.name.strip())
        check_option(named, "name", self.name, "a name, or null")
        check_option(math.isfinite(self.weight), "weight", self.weight, "a finite number")
        somewhere = self.where is None or bool(self.where)
        check_option(somewhere, "where", self.where, "a column, or null")

    @staticmethod
    def kinds() -> Mapping[str, type[RewardSpec]]:
        """Every registered kind → its class."""
        return _KINDS

    def build(self, context: BuildContext) -> RewardFunction:
        """The reward function that these options describe.

        Raises:
          ValueError: an option or a data row that the reward cannot use.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build(context)")

    def applies_to(self, row: Any) -> bool:
        """Whether a row of data has the values of `where`."""
        where = self.where or {}
        return all(str(row.get(column)) == value for column, value in where.items())

    def check_rows(self, context: BuildContext, check: Callable[[Any], object]) -> None:
        """Calls `check` on every row that the reward applies to, before training starts.

        Raises:
          ValueError: what `check` raised, with the row's origin and the reward's name.
        """
        for origin, row in Rows(context.rows).all():
            if self.applies_to(row):
                try:
                    check(row)
                except ValueError as error:
                    raise ValueError(f"{origin}: reward {context.name!r}: {error}") from None


def register_reward(spec: S) -> S:
    """Class decorator that registers a `RewardSpec` under its `kind`.

    Raises:
      ValueError: not a dataclass derived from `RewardSpec`, no default of `kind`, or a kind that
        another class has.
    """
    kind = getattr(spec, "kind", None)
    if not (issubclass(spec, RewardSpec) and "__dataclass_fields__" in vars(spec)):
        raise ValueError(
            f"reward {spec.__name__}: wanted a dataclass derived from RewardSpec; decorate it with "
            "@dataclasses.dataclass(frozen=True, kw_only=True) below @register_reward"
        )
    if not isinstance(kind, str) or not kind.strip():
        raise ValueError(f"reward {spec.__name__} kind={kind!r}: wanted a name as its default")
    other = _KINDS.get(kind)
    # Registering the same class again, as when a notebook cell runs twice, replaces the first.
    if other is not None and _path(other) != _path(spec):
        raise ValueError(f"reward {spec.__name__} kind={kind!r}: {_path(other)} has that kind")
    _KINDS[kind] = spec
    return spec


def _path(spec: type) -> str:
    return f"{spec.__module__}.{spec.__qualname__}"


def check_option(ok: bool, name: str, got: object, valid: str) -> None:
    """Checks an option.

    Raises:
      ValueError: not `ok`; names the option, its value and what is valid.
    """
    if not ok:
        raise ValueError(f"{name}={got!r}: wanted {valid}")
