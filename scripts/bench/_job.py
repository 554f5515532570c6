"""What a side-by-side run consists of, on disk: needs numpy only, so that every peer can read it.

A `Job` says what is trained on what and how. `_ours.py` and `_trl.py` are the two programs that
carry one out, each in its own process and its own virtual environment:

    PYTHON _ours.py FOLDER      # reads FOLDER/job.json, writes FOLDER/ours/
    PYTHON _trl.py FOLDER       # reads FOLDER/job.json, writes FOLDER/trl/

Each leaves `steps.jsonl` (step, loss, seconds), `done.json` (peak memory, versions) and, with held
out pairs, `scores.npz` (scores of both answers of each pair).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """Preference pairs as token ids; both sides of a pair start with the same prompt.

    Attributes:
      chosen: ids of prompt and preferred answer, one array a pair.
      rejected: the same with the other answer.
      prompts: tokens of each prompt, int `[N]`.
    """

    chosen: list[np.ndarray]
    rejected: list[np.ndarray]
    prompts: np.ndarray

    def take(self, start: int, end: int) -> Pairs:
        """Pairs `start` to `end`."""
        return Pairs(self.chosen[start:end], self.rejected[start:end], self.prompts[start:end])

    @property
    def tokens(self) -> int:
        """Tokens of all pairs, both sides."""
        return sum(map(len, self.chosen)) + sum(map(len, self.rejected))


def save_pairs(path: pathlib.Path, pairs: Pairs) -> None:
    """Writes pairs as one `.npz`: the ids end to end, and the lengths."""
    arrays: dict[str, np.ndarray] = {"prompts": np.asarray(pairs.prompts, np.int32)}
    for name in ("chosen", "rejected"):
        side = getattr(pairs, name)
        arrays[name] = np.concatenate(side).astype(np.int32)
        arrays[f"{name}_lengths"] = np.array([len(ids) for ids in side], np.int32)
    np.savez(path, **arrays)


def load_pairs(path: str | pathlib.Path) -> Pairs:
    """Reads what `save_pairs` wrote."""
    with np.load(path) as file:
        sides = [
            np.split(file[name], np.cumsum(file[f"{name}_lengths"])[:-1])
            for name in ("chosen", "rejected")
        ]
        return Pairs(*sides, file["prompts"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training run, float32, AdamW with linear warm-up and linear decay, clipped at 1.

    Attributes:
      algorithm: "reward" or "dpo".
      model: folder in Hugging Face form: the start, and DPO's reference.
      train: `.npz` of pairs, used in their order; taken from the start again when they end.
      held_out: `.npz` of pairs to score at the end; reward only.
      steps: optimizer updates.
      pairs: pairs of an update.
      length: longest side, in tokens.
      peer_pairs: pairs that the peer computes at a time; divides `pairs`.
      layout: ours: "rows", a pair a row; "packed", the pairs of an update packed; "pooled", all
        pairs packed together and cut into as many updates as they make, each of one shape: which
        pairs meet in an update is then another matter than at the peer.
      shared: ours: both answers of a pair follow one copy of their prompt, in one row.
      row_length: ours: tokens of a row.
      row_group: ours: rows computed at a time; 0: `jaxalign.commands.bench.case.cached_rows`.
      learning_rate: peak.
      warmup_steps: updates of linear rise from 0.
      beta: DPO's β.
      checkpoint_every: updates between checkpoints, from which a run that was cut goes on; 0: none.
      threads: for the peer; XLA takes what the process may use.
    """

    algorithm: str
    model: str
    train: str
    held_out: str | None = None
    steps: int
    pairs: int
    length: int
    peer_pairs: int
    layout: str
    shared: bool = False
    row_length: int
    row_group: int = 0
    learning_rate: float
    warmup_steps: int
    beta: float = 0.1
    checkpoint_every: int = 0
    threads: int = 2

    def updates(self) -> list[Pairs]:
        """The pairs of each update in one pass over the data, and again from the first."""
        data = load_pairs(self.train)
        starts = range(0, len(data.chosen) - self.pairs + 1, self.pairs)
        return [data.take(at, at + self.pairs) for at in starts]


def write_job(folder: pathlib.Path, job: Any) -> None:
    """Writes `job.json`; refuses to mix with the results of another job."""
    text = json.dumps(dataclasses.asdict(job), indent=1) + "\n"
    path = folder / "job.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{path} holds another job; remove {folder} or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read_job(folder: str | pathlib.Path) -> Job:
    """Reads `job.json`."""
    return Job(**json.loads((pathlib.Path(folder) / "job.json").read_text()))


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Adds a JSON line, at once."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_steps(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of `steps.jsonl` by step; of a step that was done twice (after a cut) the last."""
    rows = {row["step"]: row for row in read_lines(path)}
    return [rows[step] for step in sorted(rows)]


def peak_mib() -> float:
    """Peak resident memory of this program, MiB.

    From /proc where there is one: the peak of `getrusage` also counts the process that started this
    one, up to its `exec`.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        peaks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0].split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


ALLOCATOR = {"MALLOC_TOP_PAD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
"""Keeps glibc from giving memory back after every tensor, whose page faults slow torch on a CPU."""

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""What the `jaxalign` command starts itself with (`jaxalign.commands.startup.huge_pages`). With
`ALLOCATOR` a peer keeps its memory, and gains nothing by it: TRL's reward step 0.76 s without and
0.79 s with it, DPO 2.0 and 2.1 s, a PPO iteration 5.6 and 5.5 to 6.8 s."""


def environment(side: str, threads: int, devices: int = 1) -> dict[str, str]:
    """The environment variables with which a side's interpreter starts."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if side.endswith("ours"):
        root = pathlib.Path(__file__).resolve().parents[2]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        return HUGE_PAGES | {"JAX_NUM_CPU_DEVICES": str(devices)} | env
    env |= ALLOCATOR | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env.pop("PYTHONPATH", None)
    return env


def carry_out(
    side: str,
    python: str,
    folder: pathlib.Path,
    threads: int,
    devices: int = 1,
    script: str | None = None,
) -> dict[str, Any]:
    """Runs one side of a job, unless it is done already; gives its `done.json`.

    Args:
      side: "ours", "trl", "ppo_ours", …: the folder of its results.
      python: the interpreter of that side's virtual environment.
      folder: holds `job.json`.
      threads: cores that the side may use.
      devices: of ours: how many CPU devices it sees.
      script: the program, told the side as a second argument; None: `_SIDE.py`.
    """
    done = folder / side / "done.json"
    if not done.exists():
        program = pathlib.Path(__file__).with_name(f"_{side}.py" if script is None else script)
        env = environment(side, threads, devices)
        subprocess.run([python, str(program), str(folder), side], env=env, check=True)
    return json.loads(done.read_text())


# --- figures -------------------------------------------------------------------------------------


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927)."""
    share = hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return (middle - half) / whole, (middle + half) / whole


def accuracy(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """How often the chosen answer scores higher, with its 95 % interval."""
    hits, count = int(np.sum(chosen > rejected)), len(chosen)
    low, high = wilson(hits, count)
    return {"accuracy": round(hits / count, 4), "ci95": [round(low, 4), round(high, 4)]}


def curve_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest absolute difference of two loss curves of one length."""
    if len(ours) != len(theirs):
        raise ValueError(f"curves of {len(ours)} and {len(theirs)} steps; wanted the same number")
    return float(np.max(np.abs(np.subtract(ours, theirs))))


def machine(pythons: Mapping[str, str] | None = None, threads: int = 2) -> dict[str, Any]:
    """The date and what was measured on, for a results file.

    Args:
      pythons: side → interpreter: the rate of a matrix product in its libraries is recorded too.
      threads: cores that a side may use.

    Returns:
      `processor` (the kernel's name), `family` (family, model and stepping, since a name may stand
      for several processors), `instructions` (the vector and matrix sets), `huge_pages` (the
      kernel's setting), cores, Python, and with `pythons` also `matmul_gflops`.
    """
    import datetime
    import platform

    info = cpu_info()
    pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": info.get("model name", platform.processor()),
        "family": "/".join(info.get(k, "") for k in ("cpu family", "model", "stepping")),
        "instructions": [name for name in INSTRUCTIONS if name in info.get("flags", "").split()],
        "huge_pages": pages.read_text().strip() if pages.exists() else "",
        "cores": len(os.sched_getaffinity(0)),
        "python": ".".join(map(str, sys.version_info[:2])),
    }
    if pythons is not None:
        found["matmul_gflops"] = {
            side: matmul_gflops(side, python, threads) for side, python in pythons.items()
        }
    return found


INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
"""Names in /proc/cpuinfo of what matters to matrix products."""


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = pathlib.Path("/proc/cpuinfo")
    text = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def matmul_gflops(side: str, python: str, threads: int) -> dict[str, float]:
    """Library → GFLOP/s of a side's interpreter, in the environment in which the side runs."""
    program = pathlib.Path(__file__).with_name("_rates.py")
    command = [python, str(program)]
    result = subprocess.run(
        command, env=environment(side, threads), check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])
