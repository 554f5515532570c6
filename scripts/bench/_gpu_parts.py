"""The parts of `gpu.py`, most wanted first: what each runs, and what is tried where that fails."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

from jaxalign.commands.bench.case import Case
from jaxalign.commands.bench.sizes import SIZES

HERE = pathlib.Path(__file__).resolve().parent
SLOTS = (1, 8, 64, 256)
"""Answers that are written together."""

Choice = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Something to run.

    Attributes:
      name: in the results, and for `--part`.
      commands: tried in turn until one succeeds: (what is told of it, program).
      seconds: the most it may take.
      optional: a package that is missing is no failure.
    """

    name: str
    commands: tuple[tuple[Choice, list[str]], ...]
    seconds: float
    optional: bool = False


def ours(name: str, seconds: float, *choices: Choice) -> Part:
    """A case of `jaxalign bench`, with what to try where it does not fit."""
    commands = []
    for choice in choices:
        asked = json.dumps(dataclasses.asdict(Case(**choice)) | {"seconds": 8.0})
        commands.append((choice, [sys.executable, "-m", "jaxalign.commands.bench", asked]))
    return Part(name=name, commands=tuple(commands), seconds=seconds)


def theirs(name: str, peer: str, seconds: float, *choices: Choice) -> Part:
    """The peer at the same."""
    commands = []
    for choice in choices:
        job = {"dtype": "bfloat16", "checkpointing": False, "repeats": 3, "new_tokens": 0} | choice
        job["shape"] = dataclasses.asdict(SIZES[choice["size"]])
        commands.append((choice, [peer, str(HERE / "_gpu_peer.py"), json.dumps(job)]))
    return Part(name=name, commands=tuple(commands), seconds=seconds, optional=True)


def parts(*, tiny: bool, peer: str) -> list[Part]:
    """All parts.

    Args:
      tiny: shapes that a CPU computes in seconds.
      peer: the peer's interpreter.
    """
    make = _Shapes(tiny)
    checks = Part(
        name="checks", commands=(({}, [sys.executable, str(HERE / "_gpu_checks.py")]),), seconds=150
    )
    return [
        checks,
        make.packed_sft("sft-8k", 8192),
        make.packed_sft("sft-16k", 16384),
        make.lora("lora-8b"),
        *(make.decode(slots) for slots in SLOTS),
        make.dpo("dpo"),
        make.ppo("ppo-split"),
        make.peer_sft("trl-sft-8k", peer, 8192),
        make.peer_dpo("trl-dpo", peer),
        make.peer_sft("trl-sft-16k", peer, 16384),
        make.peer_decode("trl-decode-64", peer),
    ]


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """The cases, or tiny ones of the same kind."""

    tiny: bool

    def _case(self, what: str, size: str, **options: Any) -> Choice:
        kind = "float32" if self.tiny else "bfloat16"
        return {"what": what, "size": "XS" if self.tiny else size, "dtype": kind} | options

    def _length(self, length: int) -> int:
        return length // 128 if self.tiny else length

    def packed_sft(self, name: str, length: int) -> Part:
        """Two rows of packed documents a step, or one with less kept; weights in float32."""
        # A packed case has half as many rows of twice the length.
        case = self._case(
            "sft", "Qwen3-0.6B", layout="packed", length=self._length(length) // 2, repeats=5
        )
        tries = [
            case | {"rows": 4, "remat": "none"},
            case | {"rows": 2, "remat": "none"},
            case | {"rows": 2, "remat": "block"},
        ]
        return ours(name, 90, *tries)

    def lora(self, name: str) -> Part:
        """Adapters over a base in bfloat16."""
        case = self._case(
            "sft", "8B", layout="packed", length=self._length(4096), lora=16, repeats=3
        )
        case["param_dtype"] = case["dtype"]
        return ours(
            name,
            110,
            case | {"rows": 2, "remat": "dots"},
            case | {"rows": 2, "remat": "block"},
        )

    def decode(self, slots: int) -> Part:
        """Answers to that many prompts; every step reads all weights once."""
        case = self._case("generate", "3B", rows=slots, repeats=2)
        case |= {"length": 16 if self.tiny else 128, "new_tokens": 8 if self.tiny else 128}
        case["param_dtype"] = case["dtype"]
        return ours(f"decode-{slots}", 60, case)

    def dpo(self, name: str) -> Part:
        """Pairs, with the reference's log-probabilities taken anew each step."""
        case = self._case("dpo", "1B", length=self._length(2048), repeats=3)
        tries = [{"rows": 4, "remat": "none"}, {"rows": 4, "remat": "block"}, {"rows": 1}]
        return ours(name, 90, *(case | choice for choice in tries))

    def ppo(self, name: str) -> Part:
        """An iteration; `parts` of its record says what each part of it took."""
        case = self._case("ppo", "0.5B", rows=4 if self.tiny else 64, repeats=2)
        case |= {"length": 16 if self.tiny else 128, "new_tokens": 8 if self.tiny else 256}
        return ours(name, 110, case, case | {"micro_batches": 4, "remat": "block"})

    def peer_sft(self, name: str, peer: str, length: int) -> Part:
        """Full rows of the same length: as many tokens as ours, in one document a row."""
        case = self._peer("sft", "Qwen3-0.6B", length=self._length(length))
        tries = [{"rows": 2}, {"rows": 1}, {"rows": 1, "checkpointing": True}]
        return theirs(name, peer, 75, *(case | choice for choice in tries))

    def peer_dpo(self, name: str, peer: str) -> Part:
        """The same pairs."""
        case = self._peer("dpo", "1B", length=self._length(2048))
        tries = [{"rows": 4}, {"rows": 4, "checkpointing": True}, {"rows": 1}]
        return theirs(name, peer, 75, *(case | choice for choice in tries))

    def peer_decode(self, name: str, peer: str) -> Part:
        """As many answers as long."""
        case = self._peer("generate", "3B", rows=64, length=16 if self.tiny else 128)
        return theirs(name, peer, 60, case | {"new_tokens": 8 if self.tiny else 128})

    def _peer(self, what: str, size: str, **options: Any) -> Choice:
        kind = "float32" if self.tiny else "bfloat16"
        return {"what": what, "size": "XS" if self.tiny else size, "dtype": kind} | options
