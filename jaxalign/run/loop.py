"""The training loop, for all algorithms: set up, resume, loop, evaluate, save, export."""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from jaxalign.data import filled
from jaxalign.parallel import distributed
from jaxalign.parallel.chips import peak_flops
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import RunConfig
from jaxalign.run.config.yaml import to_values, write_yaml
from jaxalign.run.metrics import FLOPS, TOKENS, JsonlWriter, check_finite, rates, to_floats
from jaxalign.run.tasks import make_task

_PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
      folder: the run's folder.
      model: folder of the exported weights, or None.
      before: held-out figures before the first update ({} without held-out data, or resumed).
      after: held-out figures after the last.
      history: the metrics of every step of this process, oldest first.
      seconds: wall time, set-up and compilation included.
    """

    folder: pathlib.Path
    model: pathlib.Path | None
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, float]]
    seconds: float


def train(config: Any, title: str | None = None) -> Result:
    """Runs one configuration to its end.

    Killed anywhere and started again with `run.resume=true`, it goes on from the newest
    checkpoint and gives bit for bit the metrics of an uninterrupted run on the same mesh (all but
    those under `time/`).

    Args:
      config: from `load_config`.
      title: shown beside the progress bar.

    Raises:
      ValueError: a wrong configuration or input.
      FloatingPointError: the loss is no longer a number.
      jaxalign.parallel.distributed.Preempted: a host of several got SIGTERM.
    """
    # However the run ends, checkpoints under way are finished and files closed. What fails on one
    # host stops them all, before checkpoints are waited for: those need every host.
    with contextlib.ExitStack() as stack:
        distributed.start()
        if not distributed.is_main():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        with distributed.guard(), config.mesh.use_rules():
            return _train(config, title, stack)


def _train(config: Any, title: str | None, stack: contextlib.ExitStack) -> Result:
    began = time.perf_counter()
    run: RunConfig = config.run
    folder = pathlib.Path(run.folder)
    _check_hosts(folder, config)

    task = make_task(config)
    state, loop, done = task.state, task.loop, 0
    store = _checkpoints(run, folder)
    if store is not None:
        stack.callback(_close, store)
    if run.resume and store is not None and store.latest is not None:
        state, saved = store.restore(state)
        loop, done = saved["loop"], saved["done"]
        task.batches.set_state(saved["batches"])
    # The first step donates the state that the task began with: `state` is the one to use.
    task = task._replace(state=state)
    _describe(folder, config)
    writer = JsonlWriter(
        folder / "metrics.jsonl", done if done else None, silent=not distributed.is_main()
    )
    stack.callback(writer.close)

    def evaluate(step: int) -> dict[str, float]:
        if task.evaluate is None:
            return {}
        figures = task.evaluate(state, loop)
        writer.write(step, {f"eval/{name}": value for name, value in figures.items()})
        if task.details is not None and distributed.is_main():
            text = json.dumps({"step": step} | task.details(), indent=1)
            (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        return figures

    def save() -> None:
        position = {"loop": loop, "done": done, "batches": task.batches.get_state()}
        if store is not None:
            store.save(done, state, position)

    if task.begin is not None and done == 0:
        task.begin(state, loop)
    before = evaluate(0) if done == 0 else {}
    after = before
    root = jax.random.key(run.seed)
    history: list[dict[str, float]] = []
    batches = iter(task.batches)
    stack.callback(task.batches.close)
    bar = tqdm(
        total=task.total,
        initial=done,
        desc=title or type(config).__name__.removesuffix("Run").lower(),
        disable=not distributed.is_main(),
        dynamic_ncols=True,
    )
    stack.callback(bar.close)
    saved_at, reported, peak = done, time.perf_counter(), peak_flops()
    waiting: collections.deque[_Sent] = collections.deque()

    def report(sent: _Sent) -> None:
        """Reads the metrics of a step, waiting for it, and writes them down."""
        nonlocal reported
        full, room, tokens, giga, flops = sent.counts()
        metrics = sent.metrics | _average([to_floats(logged) for logged in sent.updates])
        check_finite(metrics, sent.step)
        metrics["compiles"] = sent.compiles
        metrics["data/fill"] = full / room
        now = time.perf_counter()
        seconds, reported = now - reported, now
        timing = sent.timing | {"time/step": seconds}
        timing |= rates(tokens, giga * _GIGA + flops, seconds, peak)
        writer.write(sent.step, metrics | timing)
        history.append(metrics)
        bar.set_postfix_str(_short(metrics), refresh=False)
        bar.update()
        if sent.step % run.log_every == 0 and not bar.disable:
            bar.write(f"{bar.desc} {sent.step}/{task.total}: {_short(metrics)}")

    while done < task.total:
        began_waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began_waiting
        key = jax.random.fold_in(root, done)
        parts, metrics = task.expand(key, state, batch, loop, batches)
        timing = {name: metrics.pop(name) for name in list(metrics) if name.startswith("time/")}
        counts = distributed.all_reduce_sum([*filled(batch), *_whole(timing)])
        updates = []
        for part in parts:
            state, logged = task.step(state, part)
            updates.append(logged)
            if task.enough is not None and task.enough(logged):
                break
        if task.enough is not None:
            metrics = metrics | {"updates": len(updates)}
        done += 1
        timing |= {"time/data": waited}
        waiting.append(_Sent(done, updates, metrics, timing, counts, task.step.compiles))
        evaluates = bool(run.eval_every) and done % run.eval_every == 0 and done < task.total
        stop = distributed.preempted(done)
        saves = stop or bool(run.save_every and done % run.save_every == 0)
        # A step's metrics are read once the next step is under way, so that no device waits for
        # this loop; but nothing is saved, or judged on held-out data, that was not found sound.
        ahead = task.ahead and not evaluates and not saves and done < task.total
        while len(waiting) > ahead:
            report(waiting.popleft())
        if evaluates:
            after = evaluate(done)
        if saves:
            save()
            saved_at = done
        if stop:
            raise distributed.Preempted(
                f"stopped after step {done} of {task.total}, as a host is to be taken away"
                + ("; run.resume=true goes on from there" if store is not None else "")
            )
        if evaluates or saves:
            reported = time.perf_counter()
    bar.close()
    if history:
        after = evaluate(done)
    if saved_at != done:
        save()
    exported = None
    if run.export:
        exported = folder / "model"
        task.export(state, exported)
    return Result(folder, exported, before, after, history, time.perf_counter() - began)


def _checkpoints(run: RunConfig, folder: pathlib.Path) -> Checkpoints | None:
    """The run's checkpoints; refuses to mix two runs in one folder.

    Raises:
      ValueError: `folder` holds checkpoints of an earlier run that is not to be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not run.checkpoint:
        return None
    store = Checkpoints(folder / "checkpoints", run.keep)
    if store.latest is not None and not run.resume:
        latest = store.latest
        store.close()
        raise ValueError(
            f"run.folder={str(folder)!r} holds checkpoints of an earlier run, up to step "
            f"{latest}; set run.resume=true to go on with it, or choose another folder"
        )
    return store


def _close(store: Checkpoints) -> None:
    """Finishes checkpoints under way, unless another host is gone, without which none can be."""
    if not distributed.job_failed():
        store.close()


def _check_hosts(folder: pathlib.Path, config: Any) -> None:
    """Refuses hosts that would not run the same program on the same folder."""
    if jax.process_count() > 1:
        distributed.check_consistent("package versions", _versions())
        distributed.check_consistent("the configuration", distributed.flatten(to_values(config)))
        distributed.check_shared_folder(folder)


def _versions() -> dict[str, str]:
    found = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | found


def _describe(folder: pathlib.Path, config: Any) -> None:
    """Leaves what is needed to do the run again: configuration and versions."""
    if not distributed.is_main():
        return
    write_yaml(folder / "config.yaml", config)
    devices = jax.devices()
    facts = _versions() | {"devices": f"{len(devices)} × {devices[0].device_kind}"}
    if jax.process_count() > 1:
        facts["processes"] = str(jax.process_count())
    (folder / "versions.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


class _Sent(NamedTuple):
    """A step that is under way: what is known of it, and what can be read when it is done."""

    step: int
    updates: list[dict[str, Any]]
    metrics: dict[str, float]
    timing: dict[str, float]
    counts: Callable[[], list[int]]
    compiles: int


_GIGA = 10**9


def _whole(timing: dict[str, float]) -> list[int]:
    """Tokens and FLOPs (10⁹ and the rest) of this process, out of what else was timed."""
    return [int(timing.pop(TOKENS)), *divmod(int(timing.pop(FLOPS)), _GIGA)]


def _average(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of the updates that one batch gave: means over updates (one, but in PPO)."""
    return {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}


_SHOWN = (
    "loss",
    "accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "objective/scores",
    "objective/kl",
    "response/length",
)


def _short(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k} {metrics[k]:.3g}" for k in _SHOWN if k in metrics)
