"""A measurement (`Case`) and its results (`Sample`, `Record`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.commands.bench.sizes import SIZES
from jaxalign.models.attention.dispatch import check_kind
from jaxalign.models.backend import backend
from jaxalign.models.layer_loop import REMAT
from jaxalign.models.lora import LoraConfig
from jaxalign.parallel.host_memory import is_cpu
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import row_shards
from jaxalign.run.config.base import ModelConfig, Run
from jaxalign.run.config.runs import load_config
from jaxalign.run.tasks import ALGORITHMS

ROWS = ("full", "padded", "packed")


def measurable() -> tuple[str, ...]:
    """The values of `Case.what`: every algorithm, and generation."""
    return (*ALGORITHMS, "generate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement, on random weights and tokens.

    Attributes:
      what: one of `measurable()`.
      size: key of `SIZES`.
      layout: "full": every row has the full length. "padded": lengths are sampled uniformly from an
        eighth of it upwards, one document per row (PPO: answers that end at random). "packed": the
        same documents packed (PPO: its updates), in half as many rows of twice the length.
      rows: rows of a step (pairs for reward and DPO, prompts for PPO and generation).
      length: tokens of a row or side; of a prompt in PPO and generation.
      new_tokens: longest answer in PPO and generation.
      epochs: PPO's epochs per rollout.
      dtype: dtype of activations; "auto": bfloat16 on GPU and TPU, float32 elsewhere.
      param_dtype: dtype of the weights.
      lora: rank of the adapters, if only adapters are trained; 0: all weights are trained.
      remat: key of `REMAT`.
      attention: see `jaxalign.models.attention.dispatch.KINDS`.
      micro_batches: micro-batches of a step; 0: on a CPU so many that each has `CACHED_TOKENS`,
        elsewhere one.
      optimizer_dtype: dtype of AdamW's moments, "float32", "bfloat16" or "int8".
      repeats: measured steps (iterations, calls).
      seconds: stop measuring after this time, but not before two steps.
    """

    what: str
    size: str = "S"
    layout: str = "full"
    rows: int = 8
    length: int = 256
    new_tokens: int = 64
    epochs: int = 4
    dtype: str = "auto"
    param_dtype: str = "float32"
    lora: int = 0
    remat: str = "none"
    attention: str = "auto"
    micro_batches: int = 0
    optimizer_dtype: str = "float32"
    repeats: int = 7
    seconds: float = math.inf

    def __post_init__(self):
        for name, choices in (
            ("what", measurable()), ("size", tuple(SIZES)),
            ("layout", ROWS), ("remat", tuple(REMAT)),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: wanted one of {', '.join(choices)}"
                )
        check_kind(self.attention)
        for name in ("rows", "length", "new_tokens", "epochs", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: wanted a positive integer")
        if self.micro_batches < 0:
            raise ValueError(f"micro_batches={self.micro_batches}: wanted 0 or more")
        if self.lora < 0 or (self.lora and self.what == "generate"):
            raise ValueError(f"{self.what}, lora={self.lora}: wanted 0, or a rank where it trains")
        if self.layout not in layouts_of(self.what):
            raise ValueError(
                f"{self.what}, layout={self.layout!r}: prompts are not packed, nor are single "
                f"answers; wanted one of {', '.join(layouts_of(self.what))}"
            )
        if self.layout == "packed" and self.rows % 2:
            raise ValueError(f"rows={self.rows}, packed: wanted an even number")

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows in the batch, and their length."""
        twice = self.layout == "packed" and self.what != "ppo"
        return (self.rows // 2, 2 * self.length) if twice else (self.rows, self.length)

    def mesh(self) -> Mesh:
        """The mesh of all devices: on a CPU along `data`, elsewhere along `fsdp`."""
        return make_mesh(data=-1, fsdp=1) if is_cpu(jax.devices()[0]) else make_mesh()

    def resolved(self) -> Case:
        """The same case with its dtype resolved."""
        if self.dtype != "auto":
            return self
        return dataclasses.replace(self, dtype=backend().default_dtype)

    def parts(self, mesh: Mesh) -> int:
        """Micro-batches of a step."""
        if self.micro_batches or not is_cpu(jax.devices()[0]):
            return max(1, self.micro_batches)
        length = self.shape[1] * (2 if self.what in _PAIRED else 1)  # both sides
        length += self.new_tokens if self.what == "ppo" else 0
        return row_parts(self.shape[0], cached_rows(length), row_shards(mesh))

    def model_config(self, dtype: str | None = None) -> ModelConfig:
        """The section `model` of a run; its weights are in `dtype`, or in `param_dtype`."""
        return ModelConfig(
            source=self.size,
            dtype=self.param_dtype if dtype is None else dtype,
            compute_dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
            lora=LoraConfig(rank=self.lora) if self.lora else None,
        )

    def config(self, mesh: Mesh) -> Run:
        """The configuration of a run like this case; the learning rate is so small that nothing
        diverges."""
        rows, length = self.shape
        values: dict[str, Any] = {
            "model": dataclasses.asdict(self.model_config()),
            "data": {"train": ["random"], "rows": rows, "length": length, "epochs": None},
            "run": {"folder": "bench", "steps": 10**6, "micro_batches": self.parts(mesh)},
            "optimizer": {
                "learning_rate": 1e-6,
                "total_steps": 10**6,
                "schedule": "linear",
                "moments": self.optimizer_dtype,
            },
        }
        if self.what == "ppo":
            values |= self._rollout_values()
        elif self.layout == "packed":
            values["data"]["packing"] = True
        return load_config(self.what, values)

    def _rollout_values(self) -> dict[str, Any]:
        stops: list[int] = []
        if self.layout != "full":
            # Random weights choose all tokens equally often, so the number of stop tokens sets the
            # length.
            vocabulary = SIZES[self.size].vocab_size
            stops = [*range(1, 1 + max(1, round(vocabulary * _MEAN_SHARE / self.new_tokens)))]
        return {
            "reward_model": self.size,
            "ppo": {"max_new_tokens": self.new_tokens, "stop_tokens": stops},
            "ppo_epochs": self.epochs,
            "pack_updates": 16 if self.layout == "packed" else 0,
        }


_MEAN_SHARE = 2
"""Ragged answers of PPO end after `new_tokens / _MEAN_SHARE` tokens on average, were none cut."""

_PAIRED = ("reward", "dpo")
"""What reads two rows for each of a batch."""


def layouts_of(what: str) -> tuple[str, ...]:
    """The layouts available for a measurement."""
    if what in ("sft", "reward", "dpo", "ppo"):
        return ROWS
    return ("full", "padded") if what == "generate" else ("full",)


_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"rows": 8, "length": 256},
    "reward": {"rows": 8, "length": 256},
    "dpo": {"rows": 8, "length": 256},
    "ppo": {"rows": 16, "length": 64, "new_tokens": 64},
    "generate": {"rows": 16, "length": 64, "new_tokens": 128},
}
"""Defaults of a case."""


def make_case(what: str, size: str, layout: str, options: dict[str, Any]) -> Case:
    """A case with the defaults of its measurement, which replace options that are None."""
    chosen: dict[str, Any] = {k: value for k, value in options.items() if value is not None}
    return Case(what=what, size=size, layout=layout, **{**_DEFAULTS.get(what, {}), **chosen})


CACHED_TOKENS = 1024
"""What a CPU computes at a time: activations of more tokens leave its caches, of fewer make its
matrix products small."""


def cached_rows(length: int) -> int:
    """Rows of this length that a CPU computes at a time."""
    return max(1, round(CACHED_TOKENS / length))


def row_parts(rows: int, group: int, shards: int) -> int:
    """The fewest micro-batches of at most `group` rows that divide evenly over the devices."""
    fit = [n for n in range(1, rows + 1) if rows % (n * shards) == 0 and rows // n <= group]
    return fit[0] if fit else max(1, rows // shards)


class Sample(NamedTuple):
    """One measured step.

    Attributes:
      seconds: total time, including data.
      tokens: real tokens that it trained on, or generated.
      flops: model FLOPs.
      parts: seconds of its parts by name; "data" is the time it waited for its batch.
      padding: the fraction of the batch's positions without a token.
    """

    seconds: float
    tokens: float
    flops: float
    parts: dict[str, float]
    padding: float = 0.0


class Runner(NamedTuple):
    """A case that is ready to run.

    Attributes:
      run: runs one step.
      compiles: how often its step was compiled so far; None if there are several programs.
      facts: what else to record.
    """

    run: Callable[[], Sample]
    compiles: Callable[[], int] | None = None
    facts: Callable[[Sequence[Sample]], dict[str, Any]] = lambda samples: {}
