"""The lock of a run's folder in a bucket: one owner, and what becomes of one that dies."""

import json

import fsspec
import pytest

from jaxalign.data.remote import place_of
from jaxalign.run import bucket_lock
from jaxalign.run.bucket_lock import BucketLock
from jaxalign.run.lock import identity

LOCK = "/b/run/.lock"


@pytest.fixture
def fs(monkeypatch):
    monkeypatch.setattr(bucket_lock, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(bucket_lock, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(bucket_lock, "_BEAT_SECONDS", 0.02)
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def lock():
    return BucketLock(place_of("memory://b/run", "run.folder"))


def left(fs, **facts):
    """A lock as another process left it."""
    fs.pipe_file(LOCK, json.dumps(identity() | {"token": "t", "beats": 0} | facts).encode())


def test_one_process_holds_it_and_gives_it_back(fs):
    with lock():
        owner = json.loads(fs.cat_file(LOCK))
        assert owner["pid"] == identity()["pid"]
        with pytest.raises(
            ValueError, match=rf"'memory://b/run' is in use by process {owner['pid']}"
        ):
            lock().__enter__()
    assert not fs.exists(LOCK)


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over(fs, capsys):
    left(fs, pid=2**22 + 5)
    with lock() as held:
        held.check()
    assert "is gone; its lock is taken over" in capsys.readouterr().out


def test_another_machine_of_the_same_name_is_waited_for(fs, monkeypatch, capsys):
    """Containers of a bucket may all be called the same: that one has another boot says nothing."""
    monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 0.1)
    left(fs, boot="another")
    with lock():
        pass
    said = capsys.readouterr().out
    assert "waiting for a sign of" in said
    assert "taken over" in said


def test_the_lock_of_a_machine_that_renews_it_is_left_alone(fs, monkeypatch):
    monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 60.0)
    left(fs, host="elsewhere", boot="another")
    beats = iter(range(1, 1000))

    def sleep(seconds):
        left(fs, host="elsewhere", boot="another", beats=next(beats))

    monkeypatch.setattr(bucket_lock.time, "sleep", sleep)
    with pytest.raises(ValueError, match=r"in use by process \d+ on elsewhere"):
        lock().__enter__()


def test_of_two_that_write_at_once_the_last_one_has_it(fs, monkeypatch):
    """Storage without an exclusive write lets both write; both read what is there then."""
    monkeypatch.setattr(
        bucket_lock.time, "sleep", lambda seconds: left(fs, host="elsewhere", boot="another")
    )
    monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 60.0)
    beaten = lock()
    monkeypatch.setattr(beaten, "_left_behind", lambda owner: False)
    with pytest.raises(ValueError, match="on elsewhere"):
        beaten.__enter__()
    assert json.loads(fs.cat_file(LOCK))["host"] == "elsewhere"


def test_who_lost_it_writes_nothing_more_and_does_not_remove_it(fs):
    with lock() as held:
        left(fs, host="elsewhere")
        held._thread.join(30)  # it ends as it finds another's name
        with pytest.raises(ValueError, match="another process took the folder over"):
            held.check()
    assert json.loads(fs.cat_file(LOCK))["host"] == "elsewhere"


def test_the_holder_renews_it(fs):
    with lock():
        deadline = 10_000
        while json.loads(fs.cat_file(LOCK))["beats"] < 2 and deadline:
            deadline -= 1
            bucket_lock.time.sleep(0.005)
        assert deadline
