"""The options of all batch functions and of a config's `data` section, checked in one place."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from jaxalign.data.faults import ON_ERROR
from jaxalign.data.scripts import check_scripts
from jaxalign.data.time_limit import TEMPLATE_SECONDS

F = TypeVar("F", bound=Callable[..., Any])

KEEP = ("answer_start", "prompt_end", "whole")
"""What to keep of a row that is too long."""
PACKING = ("best_fit", "best_fit_split", "wrapped")
SPLITS = ("train", "validation")
DEDUP = ("exact", "near")
SPECIAL_TOKENS = ("escape", "error", "keep")
THINKING = ("auto", "on", "off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How rows become batches: the options that a config's `data` section and Python share.

    Attributes:
      rows: B, rows of every batch, over all hosts.
      length: T, positions of a row (of a prompt, in PPO).
      packing: True or "best_fit": several documents (or pairs) per row, assigned once.
        "best_fit_split": documents that are too long continue in another piece instead of losing
        their end (SFT). "wrapped": plain texts are concatenated and cut where a row ends (SFT).
        False: one per row. None: SFT packs, unless it has `buckets`; everything else has one per
        row.
      epochs: passes over the data; None: forever.
      shuffle: use a new order in every pass; False keeps the order of the rows.
      keep: what to keep of a row that is too long. "answer_start": its first `length` tokens, so
        that the answer loses its end. "prompt_end": the prompt loses its start (the same tokens on
        both sides of a pair), and a row whose answer alone is too long is dropped. "whole": the row
        is dropped. None: "prompt_end" for prompts, else "answer_start".
      buckets: row widths, ascending. Each batch has the smallest width that holds its rows, and
        rows of similar length share a batch. `length` is always the last width, even if not listed.
        Only without packing. None: every batch is `length` wide.
      temperature: τ > 0, flattens the shares of a mixture: share ∝ weight^(1/τ), where the default
        weight is the source's number of rows. 1 mixes in proportion; ∞ evenly. None: as 1, but
        sources without weights are simply concatenated.
      validation: how much of the sources to hold out: a fraction in (0, 1) or a number of rows. The
        choice depends only on prompts, so rows with the same prompt stay together.
      dedup: "exact" drops a row with the same text as an earlier row. "near" also drops a row whose
        character 5-grams have a Jaccard similarity of at least `dedup_threshold` with an earlier
        row.
      dedup_threshold: in (0, 1].
      scripts: writing systems (see `jaxalign.data.scripts.SCRIPTS`); at least `script_share` of a
        row's letters must belong to them. A script is not a language: English and French both use
        Latin. None or empty: any script.
      script_share: in (0, 1].
      min_tokens: rows with fewer tokens, counted before truncation, are dropped.
      max_tokens: rows with more tokens, counted before truncation, are dropped; None: no limit.
      on_error: "stop" stops at the first bad row, naming file, line and remedy; "drop" drops bad
        rows and counts them by reason. A fault that makes a whole file unreadable always stops.
      special_tokens_in_text: how to treat message text that spells a special token of the
        tokenizer. "escape": tokenise it as plain characters, so that no text can forge a turn; this
        is counted. "error": the row is bad. "keep": it becomes the special token. Plain texts
        always keep special tokens.
      thinking: which generation prompt answers follow, if the template has two: one that leaves
        reasoning open, and one that closes it. "auto": answers that begin with reasoning follow the
        open prompt; others, and rollouts, follow the closed one; both sides of a pair follow the
        same. "on": all follow the open prompt. "off": all follow the closed prompt, and reasoning
        is removed from the training text (counted).
      chat_template_kwargs: variables for the chat template, such as `enable_thinking`; a row's
        column of this name takes precedence.
      template_timeout: seconds that the chat template may take for one row; null: no limit. Not
        enforced in the thread that reads a stream.
      streaming: read, render, tokenise and pack during training, one window at a time, for data
        that does not fit in memory.
      window: when streaming, the number of rows that are held in memory, shuffled and packed
        together.
      prefetch: batches prepared ahead in a thread; 0: none.
    """

    rows: int = 32
    length: int = 1024
    packing: bool | str | None = None
    epochs: int | None = 1
    shuffle: bool = True
    keep: str | None = None
    buckets: tuple[int, ...] | None = None
    temperature: float | None = None
    validation: float | None = None
    dedup: str | None = None
    dedup_threshold: float = 0.8
    scripts: tuple[str, ...] | None = None
    script_share: float = 0.5
    min_tokens: int = 0
    max_tokens: int | None = None
    on_error: str = "stop"
    special_tokens_in_text: str = "escape"
    thinking: str = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    template_timeout: float | None = TEMPLATE_SECONDS
    streaming: bool = False
    window: int = 1024
    prefetch: int = 2

    def __post_init__(self):
        for name, least, optional in (
            ("rows", 1, False),
            ("length", 2, False),
            ("epochs", 1, True),
            ("min_tokens", 0, False),
            ("max_tokens", 1, True),
            ("window", 1, False),
            ("prefetch", 0, False),
        ):
            _check_integer(name, getattr(self, name), least, optional)
        if not isinstance(self.packing, bool):
            plain = str(self.packing).lower()
            if plain in ("true", "false"):
                raise ValueError(
                    f"packing: got the text {self.packing!r}, wanted {plain} without quotes"
                )
            _check_choice("packing", self.packing, PACKING, "true, false or null")
        _check_choice("on_error", self.on_error, ON_ERROR)
        _check_choice("special_tokens_in_text", self.special_tokens_in_text, SPECIAL_TOKENS)
        _check_choice("thinking", self.thinking, THINKING)
        _check_choice("keep", self.keep, KEEP, "None")
        _check_choice("dedup", self.dedup, DEDUP, "None")
        self._check_ranges()
        for wrong, name, wanted in self._clashes():
            if wrong:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted it {wanted}")

    def _check_ranges(self) -> None:
        for name in ("dedup_threshold", "script_share"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name}: got {value!r}, wanted a number in (0, 1]")
        check_scripts(self.scripts)
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature!r}, wanted a positive number")
        limit = self.template_timeout
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"template_timeout: got {limit!r}, wanted positive seconds, or null")
        held_out = self.validation
        if held_out is not None and not (
            0 < held_out < 1 or (held_out >= 1 and held_out == int(held_out))
        ):
            raise ValueError(
                f"validation: got {held_out!r}, wanted a fraction in (0, 1) or a number of rows"
            )
        if self.buckets is not None:
            widths = list(self.buckets)
            if not widths or widths != sorted(set(widths)) or widths[0] < 2:
                raise ValueError(
                    f"buckets: got {widths}, wanted ascending widths of at least 2, such as "
                    f"[128, 256], up to length = {self.length}"
                )
            if widths[-1] > self.length:
                raise ValueError(
                    f"buckets: got the width {widths[-1]}, wanted at most length = {self.length}"
                )

    def _clashes(self) -> tuple[tuple[bool, str, str], ...]:
        """Option pairs in which one would be ignored: (whether they clash, a name, the remedy)."""
        streaming = self.streaming
        by_count = self.validation is not None and self.validation >= 1
        return (
            (self.buckets is not None and bool(self.packing), "buckets", "without packing"),
            (
                self.packing == "best_fit_split" and self.keep is not None,
                "keep",
                "None with packing='best_fit_split', which cuts nothing off",
            ),
            (streaming and self.dedup is not None, "dedup", "without streaming"),
            (
                streaming and by_count,
                "validation",
                "as a fraction in (0, 1) when streaming, where the number of rows is unknown",
            ),
            (streaming and self.buckets is not None, "buckets", "without streaming; pack instead"),
            (
                streaming and self.temperature is not None,
                "temperature",
                "without streaming, where the number of rows is unknown; give weights",
            ),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """The possible widths of batches, ascending."""
        return tuple(sorted({*(self.buckets if self.buckets is not None else ()), self.length}))

    def layout(self, default: str | None = None) -> Self:
        """The options with `packing` as a name: "best_fit", "wrapped", …, or None for one per row.

        Args:
          default: the value that replaces None, unless there are `buckets`.
        """
        packing = self.packing
        if packing is None:
            packing = default if self.buckets is None else None
        elif isinstance(packing, bool):
            packing = "best_fit" if packing else None
        return dataclasses.replace(self, packing=packing, scripts=self.scripts or None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(BatchOptions):
    """`BatchOptions`, and the options that a run sets outside its `data` section.

    Attributes:
      seed: the seed of the order, in [0, 2³²).
      chat_template: None (the tokenizer's), "chatml", "none", a jinja file or text; see
        `jaxalign.data.resolve_chat_template`.
      split: "train" leaves out the rows that `validation` holds out; "validation" gives only those.
      host: (index, count): this host builds its part of each batch, rows index · rows / count and
        following. Positions count global batches, so a run can resume with another number of hosts.
    """

    seed: int = 0
    chat_template: str | None = None
    split: str = "train"
    host: tuple[int, int] = (0, 1)

    def __post_init__(self):
        super().__post_init__()
        _check_integer("seed", self.seed, 0, optional=False)
        if self.seed >= 2**32:
            raise ValueError(f"seed: got {self.seed}, wanted less than 2**32")
        _check_choice("split", self.split, SPLITS)
        index, count = self.host
        if not 0 <= index < count:
            raise ValueError(f"host: got {self.host}, wanted (index, count) with index < count")
        if self.rows % count:
            raise ValueError(
                f"rows: got {self.rows}, which {count} hosts do not divide; use a multiple of "
                f"{count}"
            )

    def _clashes(self) -> tuple[tuple[bool, str, str], ...]:
        lacking = self.split == "validation" and self.validation is None
        return (*super()._clashes(), (lacking, "split", "with validation"))

    @property
    def part(self) -> slice:
        """This host's rows of a batch."""
        index, count = self.host
        size = self.rows // count
        return slice(index * size, (index + 1) * size)


def options_of(options: Options | None, fields: Mapping[str, Any]) -> Options:
    """`options` with `fields` as overrides, as every batch function takes them.

    Raises:
      TypeError: a keyword that is not an option.
      ValueError: a value that an option does not take.
    """
    return Options(**fields) if options is None else dataclasses.replace(options, **fields)


def spelled_out(function: F) -> F:
    """Decorator that makes `help` and editors show each option of `**fields` with its default.

    `**fields` hides the accepted names from a function's signature. The new signature lists the
    fields of `Options` instead.
    """
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    kept += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in dataclasses.fields(Options)
    ]
    function.__signature__ = own.replace(parameters=kept)  # type: ignore
    return function


# These change how batches are made or split over hosts, not their contents.
_NOT_IN_CHECKSUM = ("epochs", "host", "prefetch", "on_error")
# These values always enter the checksum of a saved position, in this order. An option that was
# added later enters with its name, and only if it is not the default, so that positions saved
# before it stay valid.
_IN_CHECKSUM = (
    *("buckets", "chat_template", "dedup", "dedup_threshold", "keep", "length", "max_tokens"),
    *("min_tokens", "packing", "rows", "script_share", "scripts", "seed", "shuffle", "split"),
    *("streaming", "temperature", "validation", "window"),
)


def settings_of(options: Options) -> list[Any]:
    """The settings, besides the data, that a saved position depends on, as JSON-able values."""
    later = [
        [field.name, getattr(options, field.name)]
        for field in sorted(dataclasses.fields(options), key=lambda field: field.name)
        if field.name not in (*_IN_CHECKSUM, *_NOT_IN_CHECKSUM)
        and getattr(options, field.name) != field.default
    ]
    return [*(getattr(options, name) for name in _IN_CHECKSUM), *later]


def _check_integer(name: str, value: Any, least: int, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")


def _check_choice(name: str, value: Any, choices: Sequence[str], otherwise: str = "") -> None:
    """Raises ValueError for a value that is no choice, and for None unless `otherwise` names it."""
    if value in choices or (value is None and otherwise):
        return
    wanted = ", ".join(choices) + (f" or {otherwise}" if otherwise else "")
    raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
