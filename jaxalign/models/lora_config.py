"""Options of low-rank adapters, and the rule by which a name or pattern selects matrices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
"""The projections of a block, which get adapters by default."""

LORA_NAMES = (*LORA_TARGETS, "embed", "lm_head")
"""Everything that can have adapters: projections, the token embedding and the output matrix."""

LORA_INITS = ("gaussian", "peft", "pissa")


class Patterns(Mapping[str, Any]):
    """A hashable mapping. The order of its keys matters, because the first match applies."""

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()):
        self._items = tuple(dict(items).items())

    def __getitem__(self, key: str) -> Any:
        return dict(self._items)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._items == tuple(other.items())

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices get adapters, and of which kind.

    A matrix has a name: `embed`, `lm_head`, and in layer 3 `layers.3.attention.query`, `…key`,
    `…value`, `…out`, `layers.3.mlp.gate`, `…up`, `…down`. An entry of `targets`, `rank_pattern` and
    `alpha_pattern` chooses the names whose end it is, after a dot (`query`), or that it matches as
    a regular expression (`layers\\.[0-7]\\..*`). Of several patterns the first match holds.

    Attributes:
      rank: r, columns of A.
      alpha: α; the adapter's output is scaled by α/r.
      targets: matrices to adapt, by name or regular expression. If the head is tied to the
        embedding, `embed` adapts only the look-up and `lm_head` only the head.
      rank_pattern: name or regular expression → rank, overriding `rank`.
      alpha_pattern: the same for `alpha`.
      rslora: scale by α/√r (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
      dora: also train the norm of each column (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
      dropout: must be 0, because models here use no random numbers in training.
      init: "gaussian": A is N(0, 1/in), B is 0; "peft": as PEFT's default, A is uniform within
        ±1/√in, B is 0 (for the embedding, both options mean: A is 0, B is N(0, 1)); "pissa": the r
        largest singular vectors, which are removed from the frozen base (Meng et al. 2024,
        https://arxiv.org/abs/2404.02948).
      modules_to_save: modules that are trained whole, such as `embed`, `lm_head`, `norm` or
        `attention_norm` (in all layers). A reward model's head always is.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS
    rank_pattern: Mapping[str, int] = Patterns()
    alpha_pattern: Mapping[str, float] = Patterns()
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: str = "gaussian"
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("targets", "modules_to_save"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, Patterns(getattr(self, name)))
        if self.rank < 1:
            raise ValueError(f"lora rank={self.rank}: wanted a positive integer")
        if not self.alpha > 0:
            raise ValueError(f"lora alpha={self.alpha}: wanted a positive number")
        self._check_targets()
        for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            for pattern, value in getattr(self, name).items():
                _check_pattern(name, pattern)
                if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
                    wanted = "a positive integer" if kind is int else "a positive number"
                    raise ValueError(f"lora {name}[{pattern!r}]={value!r}: wanted {wanted}")
        if self.dropout != 0:
            raise ValueError(
                f"lora dropout={self.dropout}: wanted 0. Training draws no random numbers here, so "
                "that a step can be repeated exactly; a lower rank or weight decay regularises too"
            )
        if self.init not in LORA_INITS:
            raise ValueError(f"lora init={self.init!r}: wanted one of {', '.join(LORA_INITS)}")

    def _check_targets(self) -> None:
        unknown = [t for t in self.targets if re.fullmatch(r"\w*", t) and t not in LORA_NAMES]
        if unknown or not self.targets:
            raise ValueError(
                f"lora targets={self.targets}: wanted some of {', '.join(LORA_NAMES)}, or regular "
                r"expressions for names such as layers.0.attention.query, e.g. layers\.[0-7]\..*"
            )
        for pattern in self.targets:
            _check_pattern("targets", pattern)


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"lora {option}: {pattern!r} is no name and no regular expression ({error})"
        ) from error


def chooses(pattern: str, name: str) -> bool:
    """Whether an entry selects a matrix by its full name: as a regular expression, or as its end.

    PEFT uses the same rule for its patterns.
    """
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that selects a matrix, else the default."""
    return next((value for key, value in patterns.items() if chooses(key, name)), default)
