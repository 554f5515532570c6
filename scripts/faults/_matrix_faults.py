"""The faults of `matrix.py`: what is done to a run, and how it should end."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import _runs
from _bench import FAULTS, Bench, Fault, Outcome, at_second_checkpoint, fault
from _runs import Child

# ------------------------------------------------------------------------- storage


@contextlib.contextmanager
def small_disk(place: pathlib.Path, megabytes: int) -> Iterator[None]:
    """A small file system at a folder; needs the right to mount."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: pathlib.Path) -> pathlib.Path:
    """Fills a file system to the last byte."""
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


@fault("disk full from a save on")
def _full(bench: Bench, place: pathlib.Path) -> Outcome:
    with small_disk(place, 16):
        child = at_second_checkpoint(bench, place)
        filler = fill(place)
        ended = child.wait(bench.limit)
        filler.unlink()
        lost = bench.resume(place / "run")
    return bench.outcome(ended, 74, lost, "No space left on device")


@fault("disk full for a while")
def _full_a_while(bench: Bench, place: pathlib.Path) -> Outcome:
    with small_disk(place, 16):
        child = at_second_checkpoint(bench, place)
        filler = fill(place)
        time.sleep(0.4)
        filler.unlink()
        ended = child.wait(bench.limit)
        lost = bench.lost(place / "run")
    return bench.outcome(ended, 0, lost)


@fault("disk full at a resume")
def _full_at_resume(bench: Bench, place: pathlib.Path) -> Outcome:
    with small_disk(place, 16):
        shutil.copytree(bench.half, place / "run")
        filler = fill(place)
        ended = bench.run(place / "run", "run.resume=true")
        filler.unlink()
        lost = bench.resume(place / "run")
    return bench.outcome(ended, 74, lost, "No space left on device. Make room, then run")


@fault("file size limited from a save on")
def _limited(bench: Bench, place: pathlib.Path) -> Outcome:
    child = at_second_checkpoint(bench, place)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    ended = child.wait(bench.limit)
    return bench.outcome(ended, 74, bench.resume(place / "run"), "File too large")


@fault("checkpoints become read-only")
def _read_only(bench: Bench, place: pathlib.Path) -> Outcome:
    child = at_second_checkpoint(bench, place)
    folder = str(place / "run/checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        ended = child.wait(bench.limit)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    return bench.outcome(ended, 74, bench.resume(place / "run"), "Read-only file system")


@fault("folder moved away for a while")
def _moved(bench: Bench, place: pathlib.Path) -> Outcome:
    child = at_second_checkpoint(bench, place)
    (place / "run").rename(place / "away")
    time.sleep(0.4)
    while child.poll() is None:  # a write that was pending may have made a folder in its place
        with contextlib.suppress(OSError):
            (place / "away").rename(place / "run")
            break
        time.sleep(0.02)
    ended = child.wait(bench.limit)
    if ended.status != 74:
        return bench.outcome(ended, 0, bench.lost(place / "run"))
    with contextlib.suppress(OSError):
        (place / "away").rename(place / "run")
    return bench.outcome(ended, 74, bench.resume(place / "run"), "Bring the folder back")


@fault("folder removed")
def _removed(bench: Bench, place: pathlib.Path) -> Outcome:
    child = at_second_checkpoint(bench, place)
    (place / "run").rename(place / "gone")
    ended = child.wait(bench.limit)
    made_anew = (place / "run").exists()
    return bench.outcome(
        ended, 74, "the folder was made anew" if made_anew else "", "No such file or directory"
    )


@fault("disk full before the start")
def _full_before(bench: Bench, place: pathlib.Path) -> Outcome:
    with small_disk(place, 1):
        fill(place)
        ended = bench.run(place / "run")
    return bench.outcome(ended, 74, "", "No space left on device. Make room, then run")


# ------------------------------------------------------------------------- checkpoints


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The file with the arrays' bytes."""
    files = (path for path in (folder / "state").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def _cut(folder: pathlib.Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def _flip(folder: pathlib.Path) -> None:
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 4
    largest(folder).write_bytes(data)


def _swap(folder: pathlib.Path) -> None:
    other = next(path for path in folder.parent.glob("[0-9]") if path != folder)
    shutil.copyfile(largest(other), largest(folder))


DAMAGES: dict[str, Callable[[pathlib.Path], None]] = {
    "cut": _cut,
    "a bit flipped": _flip,
    "its arrays those of another step": _swap,
    "emptied": lambda folder: largest(folder).write_bytes(b""),
    "without state": lambda folder: shutil.rmtree(folder / "state"),
    "without position": lambda folder: shutil.rmtree(folder / "loop"),
    "an empty folder beside it": lambda folder: folder.with_name("99").mkdir(),
    "metrics with damaged lines": lambda folder: _damage_metrics(folder.parents[1]),
}


def _damage_metrics(run: pathlib.Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo\xff\n\0\0\0\n' + b"[" * 100_000)


def _resumed(damage: Callable[[pathlib.Path], None]) -> Fault:
    def run(bench: Bench, place: pathlib.Path) -> Outcome:
        shutil.copytree(bench.half, place / "run")
        damage(place / "run/checkpoints/4")
        ended = bench.run(place / "run", "run.resume=true")
        return bench.outcome(ended, 0, bench.lost(place / "run"))

    return run


for _name, _damage in DAMAGES.items():
    FAULTS[f"newest checkpoint: {_name}"] = _resumed(_damage)


@fault("all checkpoints damaged")
def _all_damaged(bench: Bench, place: pathlib.Path) -> Outcome:
    shutil.copytree(bench.half, place / "run")
    for checkpoint in (place / "run/checkpoints").glob("[0-9]"):
        _flip(checkpoint)
    ended = bench.run(place / "run", "run.resume=true")
    return bench.outcome(ended, 2, "", "checkpoints in")


# ------------------------------------------------------------------------- numbers and rewards


@fault("weights that are not numbers")
def _nan_weights(bench: Bench, place: pathlib.Path) -> Outcome:
    import numpy as np
    import safetensors.numpy

    shutil.copytree(bench.models / "chat", place / "chat")
    path = place / "chat/model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = max(tensors, key=lambda key: tensors[key].size)
    tensors[name] = np.full_like(tensors[name], np.nan)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    ended = bench.run(place / "run", model={"source": str(place / "chat")})
    saved = list((place / "run/checkpoints").glob("[0-9]*")) + list((place / "run").glob("model"))
    return bench.outcome(ended, 2, "weights that are not finite were saved" if saved else "")


REWARDS = {
    "calls sys.exit": ("import sys\n", "    sys.exit(0)\n", "exit"),
    "raises": ("", "    raise KeyError('x')\n", "KeyError"),
    "gives NaN": ("", "    return float('nan')\n", "nan"),
    "gives text": ("", "    return 'good'\n", "good"),
    "never returns": ("", "    while True:\n        pass\n", "within timeout=1.0 s"),
    "sleeps": ("import time\n", "    time.sleep(1e6)\n", "within timeout=1.0 s"),
}


def _ppo(bench: Bench, place: pathlib.Path, spec: dict[str, Any], expected: str) -> Outcome:
    """A run of PPO with one reward, against one whose reward works."""
    parts: dict[str, Any] = {"kind": "ppo", "reward_model": None, "critic": "policy"}
    bench.usual(rewards=[_function(bench.place, "    return len(answer)\n")], **parts)
    ended = bench.run(place / "run", rewards=[spec], **parts)
    return bench.outcome(ended, 2, "", expected, kind="ppo")


def _function(place: pathlib.Path, body: str, head: str = "") -> dict[str, Any]:
    (place / "score.py").write_text(f"{head}def score(prompt, answer):\n{body}")
    return {"kind": "function", "path": f"{place / 'score.py'}:score", "timeout": 1.0}


def _reward(head: str, body: str, expected: str) -> Fault:
    return lambda bench, place: _ppo(bench, place, _function(place, body, head), expected)


for _name, _parts in REWARDS.items():
    FAULTS[f"a reward {_name}"] = _reward(*_parts)


def _drip(part: bytes, forever: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(part)
        while True:
            connection.sendall(forever)
            time.sleep(0.1)

    return answer


SERVERS: dict[str, Callable[[socket.socket], None]] = {
    "drips its headers": _drip(b"HTTP/1.1 200 OK\r\n", b"X-Wait: 1\r\n"),
    "drips the body of an error": _drip(b"HTTP/1.1 400 No\r\nContent-Length: 99999\r\n\r\n", b"x"),
    "drips its body": _drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b" "),
    "says nothing": lambda connection: time.sleep(3600),
    "sends garbage": lambda connection: connection.sendall(bytes(range(256)) * 16),
}


@contextlib.contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server on a free port that answers every connection so."""
    listening = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            answer(connection)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    listening.close()


def _server(answer: Callable[[socket.socket], None]) -> Fault:
    def run(bench: Bench, place: pathlib.Path) -> Outcome:
        with serving(answer) as url:
            spec = {"kind": "http", "url": url, "timeout": 1.0, "max_failures": 2, "backoff": 0.1}
            return _ppo(bench, place, spec, "2 times in a row")

    return run


for _name, _answer in SERVERS.items():
    FAULTS[f"a server {_name}"] = _server(_answer)


# ------------------------------------------------------------------------- files

YAMLS = {
    "aliases of aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n"
              for n in range(9)),
    "of 2 MiB": "a: " + "x" * (2 << 20),
    "of 5,000 brackets": "a: " + "[" * 5000,
    "with a number of 400 digits": "run: {seed: " + "9" * 400 + "}",
    "that holds itself": "a: &a {b: *a}",
    "with a list as a key": "[a, b]: c",
}  # fmt: skip


def _config(text: str | None) -> Fault:
    def run(bench: Bench, place: pathlib.Path) -> Outcome:
        path = place / "x.yaml"
        if text is None:
            os.mkfifo(path)
        else:
            path.write_text(text)
        child = Child(_runs.command("sft", str(path)), place / "log")
        return bench.outcome(child.wait(bench.limit), 2)

    return run


for _name, _text in YAMLS.items():
    FAULTS[f"a YAML {_name}"] = _config(_text)
FAULTS["a named pipe as the YAML"] = _config(None)


def _data(make: Callable[[pathlib.Path], None]) -> Fault:
    def run(bench: Bench, place: pathlib.Path) -> Outcome:
        path = place / "rows.jsonl"
        make(path)
        return bench.outcome(bench.run(place / "run", f"data.train={path}"), 2)

    return run


_KEYS = ", ".join(f'"k{n}": 0' for n in range(300_000))
DATA: dict[str, Callable[[pathlib.Path], Any]] = {
    "a named pipe": os.mkfifo,
    "a row of 300,000 keys, one twice": lambda p: p.write_text("{" + _KEYS + ', "k1": 0}\n'),
    "a row 100,000 deep": lambda p: p.write_text("[" * 100_000 + "\n"),
    "a link to a device": lambda p: p.symlink_to("/dev/zero"),
    "an empty file": lambda p: p.write_text(""),
}

for _name, _make in DATA.items():
    FAULTS[f"data: {_name}"] = _data(_make)


@fault("a model whose weights are cut")
def _cut_model(bench: Bench, place: pathlib.Path) -> Outcome:
    shutil.copytree(bench.models / "chat", place / "chat")
    path = place / "chat/model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    return bench.outcome(bench.run(place / "run", model={"source": str(place / "chat")}), 2)


# ------------------------------------------------------------------------- signals and others


def _signalled(numbers: list[int], status: int) -> Fault:
    def run(bench: Bench, place: pathlib.Path) -> Outcome:
        child = at_second_checkpoint(bench, place)
        for number in numbers:
            child.kill(number)
            time.sleep(0.05)
        ended = child.wait(bench.limit)
        return bench.outcome(ended, status, bench.resume(place / "run"))

    return run


FAULTS["SIGTERM"] = _signalled([signal.SIGTERM], 75)
FAULTS["Ctrl-C"] = _signalled([signal.SIGINT], 75)


@fault("a second run in the folder")
def _second(bench: Bench, place: pathlib.Path) -> Outcome:
    first = at_second_checkpoint(bench, place)
    second = bench.run(place / "run", "run.resume=true")
    status = first.wait(bench.limit).status
    lost = bench.lost(place / "run") if status == 0 else f"the first ended with {status}"
    return bench.outcome(second, 2, lost, "in use by process")


@fault("a device out of memory (an artificial error)")
def _out_of_memory(bench: Bench, place: pathlib.Path) -> Outcome:
    def break_step() -> None:
        import jax

        from jaxalign.run import loop

        plain = loop.run_step

        def run_step(*args: Any) -> Any:
            if args[5] == 4:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
            return plain(*args)

        loop.run_step = run_step

    ended = bench.run(place / "run", before=break_step)
    return bench.outcome(ended, 2, bench.resume(place / "run"), "take most")
