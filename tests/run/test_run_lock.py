"""One owner for a run's folder, and locks that no process holds any more."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from jaxalign.run import lock
from jaxalign.run.lock import LOCK, STALE_SECONDS, FolderLock

HOLDER = """
import pathlib, sys, time
from jaxalign.run.lock import FolderLock
with FolderLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_has_one_owner_until_it_is_let_go(tmp_path):
    folder = tmp_path / "runs" / "one"
    with FolderLock(folder):
        owner = json.loads((folder / LOCK).read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        with (
            pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*remove .*lock"),
            FolderLock(folder),
        ):
            pass
        assert json.loads((folder / LOCK).read_text()) == owner
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_folders_that_were_made_for_nothing_go_again(tmp_path):
    with FolderLock(tmp_path / "runs" / "one"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_holds_nothing(tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
            FolderLock(tmp_path).__enter__()
        holder.kill()
        # Not waited for: a process that nobody has buried is gone all the same.
        deadline = time.monotonic() + 60
        while lock._is_process(holder.pid, None) and time.monotonic() < deadline:
            time.sleep(0.01)
        with FolderLock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert f"process {holder.pid} on" in capsys.readouterr().out
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


HERE = lock._identity()


def write_lock(path, owner, age=0.0):
    path.write_text(json.dumps(HERE | {"token": "theirs"} | owner))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(
    ("owner", "age", "taken"),
    [
        ({"pid": os.getppid(), "began": lock._began(os.getppid())}, 0, False),
        ({"pid": os.getppid(), "began": lock._began(os.getppid())}, 2 * STALE_SECONDS, False),
        ({"pid": os.getppid(), "began": "1"}, 0, True),
        ({"boot": "another"}, 0, True),
        ({"host": "elsewhere"}, 2 * STALE_SECONDS, True),
        ({"namespace": "pid:[1]"}, 2 * STALE_SECONDS, True),
    ],
    ids=["runs", "runs silently", "number reused", "rebooted", "elsewhere", "another container"],
)
def test_whose_lock_is_left_behind(tmp_path, owner, age, taken):
    path = tmp_path / LOCK
    write_lock(path, owner, age)
    if taken:
        with FolderLock(tmp_path):
            assert json.loads(path.read_text())["token"] != "theirs"
        assert not path.exists()
        return
    with pytest.raises(ValueError, match=f"in use by process {owner['pid']} on {HERE['host']}"):
        FolderLock(tmp_path).__enter__()
    assert json.loads(path.read_text())["token"] == "theirs"


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_elsewhere_is_given_time_for_a_sign(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(lock, "STALE_SECONDS", 600.0 if lives else 0.3)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if lives and len(slept) == 3:
            os.utime(tmp_path / LOCK)
        if not lives:
            os.utime(tmp_path / LOCK, (stamp, stamp))
            pause(0.1)

    pause, stamp = time.sleep, time.time()
    monkeypatch.setattr(lock.time, "sleep", sleep)
    write_lock(tmp_path / LOCK, {"host": "elsewhere"}, age=0.0 if not lives else 5.0)
    if not lives:
        os.utime(tmp_path / LOCK, (stamp, stamp))
        with FolderLock(tmp_path):
            pass
        assert slept
        return
    with pytest.raises(ValueError, match=r"in use by process .* on elsewhere"):
        FolderLock(tmp_path).__enter__()
    assert len(slept) == 3
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_lock_that_cannot_be_read_is_no_free_folder(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text("{")
    monkeypatch.setattr(FolderLock, "_falls_silent", lambda self, owner: False)
    with pytest.raises(ValueError, match=r"in use by process \? on \?"):
        FolderLock(tmp_path).__enter__()


def test_who_was_quicker_keeps_a_lock_that_was_left_behind(tmp_path, monkeypatch):
    """Two processes see the same stale lock; the second one finds the first one's in its place."""
    stale = HERE | {"pid": os.getppid(), "began": "1"}
    quicker = HERE | {"token": "quicker"}
    (tmp_path / LOCK).write_text(json.dumps(stale))
    take_away = FolderLock._take_away

    def late(self, owner):
        (tmp_path / LOCK).write_text(json.dumps(quicker))
        take_away(self, owner)

    monkeypatch.setattr(FolderLock, "_take_away", late)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        FolderLock(tmp_path).__enter__()
    assert json.loads((tmp_path / LOCK).read_text()) == quicker


def test_the_holder_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    with FolderLock(tmp_path):
        path = tmp_path / LOCK
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1
