"""The kinds of run that `kills.py` kills: how each starts, resumes, and is compared."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import _runs
from _runs import Child, Compared


class Reference:
    """An uninterrupted run of a kind, and how to start others like it.

    Args:
      kind: sft, reward, dpo, kto, ppo, grpo, pipeline, quickstart or synth.
      place: folder for everything.
      models: folder with the tiny models.
    """

    def __init__(self, kind: str, place: pathlib.Path, models: pathlib.Path):
        self.kind, self._models = kind, models
        self.folder = place / f"reference-{kind}" / "run"
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self.folder.parent.mkdir()
        # The first run compiles; the second is as fast as those that will be killed.
        for _ in range(2):
            self._clear(self.folder)
            ended = self.start(self.folder).wait()
            if ended.status:
                raise RuntimeError(f"{kind}: status {ended.status}\n{ended.log}")
        self.seconds = ended.seconds
        self.lines = sum(1 for _ in all_lines(self.folder))

    def _clear(self, folder: pathlib.Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for path in folder.parent.glob(f"{folder.name}.jsonl*"):
            path.unlink()

    def arguments(self, folder: pathlib.Path, *, resume: bool = False) -> list[str]:
        """The command for a run in `folder`."""
        if self.kind == "quickstart":
            return quickstart_arguments(self._models, folder)
        path = folder.parent / f"{folder.name}.yaml"
        path.write_text(json.dumps(self._values(folder)))
        more = {"pipeline": "defaults.run.resume=auto", "synth": "seed=0"}
        name = "ppo" if self.kind == "grpo" else self.kind
        again = [more.get(self.kind, "run.resume=auto")] if resume else []
        return [name, str(path), *again]

    def _values(self, folder: pathlib.Path) -> dict[str, Any]:
        if self.kind == "pipeline":
            return _runs.pipeline_settings(self._models, folder)
        if self.kind == "synth":
            return synth_settings(folder)
        return _runs.settings(self.kind, self._models, folder)

    def start(self, folder: pathlib.Path, *, resume: bool = False) -> Child:
        """Starts a run in a fork."""
        run = _runs.command(*self.arguments(folder, resume=resume))
        if self.kind == "quickstart":
            command = run

            def run() -> int:
                use_tiny_examples(folder.parent / f"{folder.name}-examples")
                return command()

        return Child(run, folder.parent / f"{folder.name}.log")

    def compare(self, folder: pathlib.Path) -> Compared:
        """A finished run with this one."""
        if self.kind == "synth":
            return compare_synth(folder, self.folder)
        if self.kind not in ("pipeline", "quickstart"):
            return _runs.compare(folder, self.folder)
        parts = [
            (path.name, _runs.compare(folder / path.name, path))
            for path in sorted(self.folder.iterdir())
            if (path / "metrics.jsonl").exists()
        ]
        return Compared(*([f"{n}: {x}" for n, p in parts for x in p[i]] for i in range(3)))


def all_lines(folder: pathlib.Path) -> Iterator[str]:
    """The lines of all metrics, or of the journal, of a run."""
    for pattern in ("metrics.jsonl", "*/metrics.jsonl"):
        for path in sorted(folder.glob(pattern)):
            yield from path.read_text(errors="replace").splitlines()
    for path in folder.parent.glob(f"{folder.name}.jsonl.journal"):
        yield from path.read_text(errors="replace").splitlines()


def quickstart_arguments(models: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """The quickstart on the tiny model."""
    stages = ("sft", "reward", "ppo", "dpo")
    small = [f"{stage}.run.steps={2 if stage == 'ppo' else 1}" for stage in stages]
    small += [f"{stage}.optimizer.warmup_steps=0" for stage in stages]
    small += [f"{s}.data.{n}" for s in ("sft", "reward", "dpo") for n in ("rows=8", "length=64")]
    small += ["ppo.minibatches=1", "ppo.data.length=24", "ppo.data.rows=8"]
    small += ["ppo.ppo.max_new_tokens=4"]
    return ["quickstart", "--model", str(models / "chat"), "--out", str(folder), *small]


def use_tiny_examples(folder: pathlib.Path) -> None:
    """Puts a handful of short rows in the place of the example data, within a fork."""
    import chatmodel

    from jaxalign.commands.quickstart import stages
    from jaxalign.run import pipeline

    pairs = [
        {"prompt": q, "chosen": "yes", "rejected": "no", "kind": "cold"}
        for q in chatmodel.QUESTIONS[:8]
    ]
    tiny = {
        "conversations": chatmodel.CONVERSATIONS,
        "preferences": pairs,
        "judge": pairs,
        "prompts": [{"prompt": q} for q in chatmodel.QUESTIONS[:8]],
    }
    (folder / "en").mkdir(parents=True, exist_ok=True)
    for name, rows in tiny.items():
        for split in (name, f"{name}_heldout"):
            chatmodel.write_rows(folder / "en" / f"{split}.jsonl", rows)
    recipe = folder / "recipe.yaml"
    text = stages.RECIPE.read_text(encoding="utf-8")
    recipe.write_text(text.replace("answer_tokens: 40", "answer_tokens: 4"))
    for module in (pipeline, stages):
        module.EXAMPLES = folder
    stages.RECIPE = recipe


ADDRESS: list[str] = []
"""Where the small server for synthesis listens."""


@contextlib.contextmanager
def synth_server(place: pathlib.Path) -> Iterator[None]:
    """A server that plays the model of `jaxalign synth`, in a process of its own."""
    note = place / "address"
    note.unlink(missing_ok=True)

    def serve() -> int:
        import writers

        def slow(body: Any, number: int) -> Any:
            time.sleep(0.05)
            return writers.friendly(body, number)

        with writers.serving(slow) as server:
            note.with_suffix(".tmp").write_text(server.address)
            note.with_suffix(".tmp").rename(note)
            signal.pause()
        return 0

    child = Child(serve, place / "server.log")
    while not note.exists():
        if child.poll() is not None:
            raise RuntimeError("the server for synthesis ended")
        time.sleep(0.05)
    ADDRESS[:] = [note.read_text()]
    os.environ["OPENAI_API_KEY"] = "none"
    try:
        yield
    finally:
        child.kill()
        child.wait()


def synth_settings(folder: pathlib.Path) -> dict[str, Any]:
    """Self-Instruct, asked of the small server."""
    server = {"address": ADDRESS[0], "backoff": 0.01}
    return {
        "out": str(folder.with_name(f"{folder.name}.jsonl")),
        "writer": {"model": "player", "server": server},
        "instruct": {"seeds": ["${examples}/seed_tasks.jsonl"], "count": 30, "tasks_per_prompt": 4},
    }


def compare_synth(ours: pathlib.Path, theirs: pathlib.Path) -> Compared:
    """The rows that synthesis wrote, but for when."""
    sets = []
    for folder in (ours, theirs):
        rows = _runs.rows(folder.with_name(f"{folder.name}.jsonl"))
        for row in rows:
            row.get("provenance", {}).pop("time", None)
        sets.append([json.dumps(row, sort_keys=True) for row in rows])
    count, wanted = (collections.Counter(each) for each in sets)
    different = ["order"] if count == wanted and sets[0] != sets[1] else []
    return Compared(
        [row[:80] for row in (wanted - count).elements()],
        [row[:80] for row in (count - wanted).elements()],
        different,
    )
