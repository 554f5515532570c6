"""What the scripts of this folder share: tiny runs of every kind, in forks of a loaded process.

A fork has the modules that the command imports already, so a run begins where a fresh process is
after some seconds of imports. No fork happens once JAX has started its devices.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = "JAX_COMPILATION_CACHE_DIR"


def prepare_environment(place: pathlib.Path) -> None:
    """Sets what forks need, and imports what they run; call it before anything imports JAX.

    Compiled programs are kept in `place/programs`, also those that compile fast.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ[CACHE] = str(place / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    for folder in (ROOT, ROOT / "tests"):
        sys.path.insert(0, str(folder))
    import chatmodel
    import datasets
    import grain
    import orbax.checkpoint

    from jaxalign.commands import cli
    from jaxalign.commands.quickstart import stages
    from jaxalign.commands.synth import run
    from jaxalign.run import loop, pipeline

    _ = (chatmodel, datasets, grain, orbax.checkpoint, stages, run, loop, pipeline)
    cli.commands()


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
      status: exit status, or −n if signal n ended it.
      seconds: it took.
      peak: resident memory at most, in MiB.
      log: what it printed.
      processor: seconds of processor time.
    """

    status: int
    seconds: float
    peak: float
    log: str
    processor: float


class Child:
    """A function in a fork, in a process group of its own.

    Args:
      function: gives the exit status.
      log: file of what it prints.
    """

    def __init__(self, function: Callable[[], int | None], log: pathlib.Path):
        self._log, self._began = log, time.monotonic()
        self._ended: Ended | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_child(function, log)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def poll(self) -> Ended | None:
        """How it ended, or None while it runs."""
        if self._ended is None:
            self._note(*os.wait4(self.pid, os.WNOHANG))
        return self._ended

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; none to a process that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, limit: float = 3600.0) -> Ended:
        """Waits for its end; kills what takes longer than `limit` seconds (status −9)."""
        end = time.monotonic() + limit
        while (ended := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.005)
        return ended

    def _note(self, pid: int, status: int, usage: resource.struct_rusage) -> None:
        if pid:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            code = os.waitstatus_to_exitcode(status)
            processor = usage.ru_utime + usage.ru_stime
            self._ended = Ended(code, self.seconds, usage.ru_maxrss / 1024, text, processor)


def _run_child(function: Callable[[], int | None], log: pathlib.Path) -> None:
    status = 1
    try:
        os.setsid()
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        status = function() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def command(*arguments: str) -> Callable[[], int]:
    """A function for `Child`: a command of jaxalign."""

    def run() -> int:
        from jaxalign.commands import cli

        return cli.main(list(arguments))

    return run


def make_models(place: pathlib.Path) -> pathlib.Path:
    """A tiny language model and a tiny reward model, made in a fork."""

    def make() -> int:
        import chatmodel

        chatmodel.save_models(place / "models")
        return 0

    ended = Child(make, place / "models.log").wait()
    if ended.status:
        raise RuntimeError(ended.log)
    return place / "models"


# ------------------------------------------------------------------------- settings

STEPS = 6


def settings(
    kind: str, models: pathlib.Path, folder: pathlib.Path, steps: int = STEPS, **run: Any
) -> dict[str, Any]:
    """Nested values of a tiny run: sft, reward, dpo, kto, ppo or grpo; its data lies beside it.

    It saves after every second step, and evaluates after every third, before and at the end.
    """
    import chatmodel

    algorithm = "ppo" if kind == "grpo" else kind
    plan = {"save_every": 2, "eval_every": 3, "save_minutes": None} | run
    values = chatmodel.settings(algorithm, models, folder, steps=steps, **plan)
    held_out = folder.parent / f"{folder.name}-held.jsonl"
    if plan["eval_every"]:
        values["data"]["eval"] = [chatmodel.write_rows(held_out, chatmodel.ROWS[algorithm][:4])]
    if kind == "sft" and plan["eval_every"]:
        values["run"]["keep_best"] = "eval/loss/nll"
    if algorithm == "ppo":
        values |= {"dump_every": 1, "dump_samples": 3, "ppo_epochs": 2, "minibatches": 2}
        values["ppo"] = {"max_new_tokens": 6, "kl_target": 0.5}
    if kind == "grpo":
        values |= {"ppo_epochs": 1, "minibatches": 1}
        values["data"]["rows"] = 4
        values["ppo"] = {
            "advantage_estimator": "grpo", "samples": 2, "max_new_tokens": 6,
            "scale_rewards": "group", "kl_in": "loss", "kl_estimator": "k3",
        }  # fmt: skip
    return values


def pipeline_settings(models: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Nested values of a pipeline: SFT, a reward model from it, DPO from it."""
    stages = []
    for name in ("sft", "reward", "dpo"):
        values = settings(name, models, folder.parent / f"{folder.name}-{name}", steps=3)
        values["run"].pop("folder")
        if name != "sft":
            values["model"]["source"] = "${sft}"
        stages.append({"name": name, "algorithm": name} | values)
    return {"folder": str(folder), "stages": stages}


# ------------------------------------------------------------------------- what is left


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file without what a clock measured; a damaged one counts as itself."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            row = {"damaged": repr(line)}
        found.append({k: v for k, v in row.items() if not k.startswith("time/")})
    return found


def key(row: dict[str, Any]) -> str:
    """What a line of metrics is about."""
    kind = "evaluation" if any(name.startswith("eval/") for name in row) else "step"
    return f"{kind} {row.get('step')}"


class Compared(NamedTuple):
    """Two runs.

    Attributes:
      lost: lines of metrics that only the uninterrupted run has.
      doubled: lines that the other one has too often.
      different: lines and files with other contents, by name.
    """

    lost: list[str]
    doubled: list[str]
    different: list[str]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.lost or self.doubled or self.different)


_BY_BYTES = ("model/*", "rollouts.jsonl", "histograms.jsonl", "evaluation.json")


def compare(ours: pathlib.Path, theirs: pathlib.Path) -> Compared:
    """A run's folder with an uninterrupted one's: metrics, weights, dumps, position of the loop."""
    mine, wanted = rows(ours / "metrics.jsonl"), rows(theirs / "metrics.jsonl")
    count, wanted_count = (collections.Counter(map(key, each)) for each in (mine, wanted))
    lost, doubled = (wanted_count - count).elements(), (count - wanted_count).elements()
    known = {key(row): row for row in wanted}
    different = [key(row) for row in mine if known.get(key(row), row) != row]
    different += _different_files(ours, theirs)
    return Compared(list(lost), list(doubled), different)


def _different_files(ours: pathlib.Path, theirs: pathlib.Path) -> Iterator[str]:
    for pattern in _BY_BYTES:
        names = {p.relative_to(f) for f in (ours, theirs) for p in f.glob(pattern)}
        for name in sorted(names):
            both = [(folder / name) for folder in (ours, theirs)]
            if not all(path.exists() for path in both):
                yield f"{name} missing"
            elif both[0].read_bytes() != both[1].read_bytes():
                yield str(name)
    steps = [p.name for p in (theirs / "checkpoints").glob("*") if p.name.isdecimal()]
    if not steps:  # the quickstart's stages keep none
        return
    last = max(steps, key=int)
    position = pathlib.Path("checkpoints") / last / "loop" / "metadata"
    if not (ours / position).exists():
        yield f"{position} missing"
    elif json.loads((ours / position).read_text()) != json.loads((theirs / position).read_text()):
        yield str(position)


def write_json(path: pathlib.Path, head: dict[str, Any], name: str, entries: list[Any]) -> None:
    """Writes `head` and a list under `name`, a line for each entry; whole or not at all."""
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    text = json.dumps(head, indent=1)[:-2] + f',\n "{name}": [\n{lines}\n ]\n}}\n'
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text)
    fresh.replace(path)
