"""Storage that fails: what is tried again, and what the run says and leaves when it ends."""

import errno
import os
import resource
import shutil
import sys
import time
import types

import chatmodel
import jax
import numpy as np
import optax
import pytest
import yaml

from jaxalign.algorithms.state import init_state
from jaxalign.commands import cli
from jaxalign.data.paths import replace_text
from jaxalign.run import storage
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.lock import FolderLock
from jaxalign.run.metrics import JsonlWriter
from jaxalign.run.quiet import quiet_failures
from jaxalign.run.record import RECORD
from jaxalign.run.reporter import Reporter, StepRecord
from jaxalign.run.storage import LineFile, StorageError, describe, failure_of, retry
from jaxalign.run.usage import USAGE, write_usage

pytestmark = pytest.mark.usefixtures("kept_programs")

ALL = list(storage.DELAYS)


@pytest.fixture
def clock(monkeypatch):
    """Moves by hand: the seconds that were waited, and what happens after so many waits."""

    class Clock:
        def __init__(self):
            self.waited, self.then = [], {}

        def sleep(self, seconds):
            self.waited.append(seconds)
            self.then.pop(len(self.waited), lambda: None)()

    clock = Clock()
    monkeypatch.setattr(storage, "_sleep", clock.sleep)
    return clock


@pytest.fixture
def limit():
    """Sets the largest size of a file, as `ulimit -f` does; None: none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_limit
    set_limit(None)


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_waits_double_and_are_bounded(clock, tmp_path, capsys):
    with pytest.raises(StorageError, match=r"x could not be written: No space left .* MiB free"):
        retry(full, "x", tmp_path, safe=lambda: "All is safe")
    assert clock.waited == ALL == [0.5, 1, 2, 4, 8, 16]
    assert capsys.readouterr().out.count("x: No space left on device; trying again in") == 6
    tries = iter([full, full, lambda: 5])
    assert retry(lambda: next(tries)(), "x", tmp_path) == 5
    assert clock.waited[6:] == [0.5, 1]


def test_other_errors_are_not_tried_again(clock, tmp_path):
    for error in (ValueError("wrong"), OSError(errno.EINVAL, "invalid"), KeyError("No space left")):
        with pytest.raises(type(error)):
            retry(lambda error=error: (_ for _ in ()).throw(error), "x", tmp_path)
    assert clock.waited == []


def test_the_cause_is_found_behind_other_exceptions():
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert failure_of(wrapped) == errno.ENOSPC
    tensorstore = 'RESOURCE_EXHAUSTED: Error writing "w" [OS error 28: No space left on device]'
    assert failure_of(ValueError(tensorstore)) == errno.ENOSPC
    assert failure_of(ValueError("does not fit")) is None


def test_a_full_disk_anywhere_names_the_remedy_and_ends_with_status_74():
    message, status = describe(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert status == 74
    assert message.startswith("No space left on device. Make room, then run the same command")
    message, _ = describe(OSError(errno.EROFS, "read-only", "runs/x/run.json"))
    assert message.startswith("runs/x/run.json: Read-only file system. Make it writable, then")


def test_a_wrong_path_is_no_failure_of_storage():
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "rows.jsonl")
    assert describe(error) == (str(error), 2)
    assert describe(ValueError("rows=0")) == ("rows=0", 2)


def test_a_line_arrives_whole_or_not_at_all(clock, limit, tmp_path):
    file = LineFile(tmp_path / "x", lambda: "All is safe")
    file.write("a" * 60_000 + "\n")
    limit(100_000)
    with pytest.raises(StorageError, match=r"File too large.*ulimit -f.*All is safe"):
        file.write("b" * 60_000 + "\n")
    assert (tmp_path / "x").read_text() == "a" * 60_000 + "\n"  # and not 39,999 of the 60,001
    clock.then[len(clock.waited) + 2] = lambda: limit(None)
    file.write("c" * 60_000 + "\n")
    file.close()
    assert (tmp_path / "x").read_text() == "a" * 60_000 + "\n" + "c" * 60_000 + "\n"


def test_lines_follow_the_name_of_the_file(clock, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    writer = JsonlWriter(folder / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    (folder / "metrics.jsonl").unlink()
    writer.write(2, {"loss": 1.0})
    assert [row["step"] for row in chatmodel.lines(folder)] == [2]
    folder.rename(tmp_path / "away")
    clock.then[2] = lambda: (tmp_path / "away").rename(folder)
    writer.write(3, {"loss": 1.0})
    assert [row["step"] for row in chatmodel.lines(folder)] == [2, 3]
    shutil.rmtree(folder)
    with pytest.raises(StorageError, match=r"No such file.*Bring the folder back.*resume=auto"):
        writer.write(4, {"loss": 1.0})
    writer.close()
    assert not folder.exists()


def test_a_folder_that_was_moved_is_not_replaced_by_another(clock, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    writer = JsonlWriter(folder / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    folder.rename(tmp_path / "away")
    folder.mkdir()  # as a pending write does

    def back():
        folder.rmdir()
        (tmp_path / "away").rename(folder)

    clock.then[3] = back
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in chatmodel.lines(folder)] == [1, 2]


SIZE = 300  # kB of weights that do not compress


@pytest.fixture(scope="module")
def states():
    def state(seed):
        weights = jax.random.normal(jax.random.key(seed), (SIZE * 250,))
        return init_state({"w": weights}, optax.sgd(1e-3))

    return {step: state(step) for step in (1, 2, 3)}


def value_of(store, states):
    got, loop = store.restore(states[1])
    np.testing.assert_array_equal(got.params["w"], states[loop["done"]].params["w"])
    return loop["done"]


def test_a_checkpoint_that_failed_in_the_background_is_made_up_for(
    clock, limit, states, tmp_path, capfd
):
    store = Checkpoints(tmp_path / "c", keep=None)
    store.save(1, states[1], {"done": 1})
    store.finish(1, states[1], {"done": 1})
    limit(SIZE * 500)
    store.save(2, states[2], {"done": 2})
    clock.then[2] = lambda: limit(None)
    store.save(3, states[3], {"done": 3})
    said = capfd.readouterr()
    assert "c/2 could not be written: File too large; saving step 3 in its place" in said.out
    assert clock.waited == [0.5, 1]
    assert "Traceback" not in said.err
    assert store.steps == [1, 3]
    assert value_of(store, states) == 3
    store.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "3"]


def test_storage_that_stays_full_ends_with_the_older_ones_intact(
    clock, limit, states, tmp_path, capfd
):
    store = Checkpoints(tmp_path / "c", keep=1)
    store.save(1, states[1], {"done": 1})
    store.finish(1, states[1], {"done": 1})
    limit(SIZE * 500)
    store.save(2, states[2], {"done": 2})
    with pytest.raises(StorageError, match=r"c/2 could not .*checkpoint of step 1 is complete"):
        store.finish(2, states[2], {"done": 2})
    limit(None)
    assert clock.waited == ALL
    assert "Traceback" not in capfd.readouterr().err
    store = Checkpoints(tmp_path / "c")
    store.remove_unfinished()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1"]
    assert value_of(store, states) == 1
    store.close()


def test_what_a_pending_save_makes_in_the_place_of_a_moved_folder_is_removed(
    clock, states, tmp_path
):
    folder, away = tmp_path / "run", tmp_path / "away"
    store = Checkpoints(folder / "checkpoints", keep=None)
    store.save(1, states[1], {"done": 1})
    store.finish(1, states[1], {"done": 1})
    store.save(2, states[2], {"done": 2})
    store._manager.wait_until_finished()
    folder.rename(away)
    shutil.copytree(away / "checkpoints/2", folder / "checkpoints/2")  # created anew by the save
    shutil.rmtree(away / "checkpoints/2")
    clock.then[2] = lambda: away.rename(folder)  # which fails where anything is
    store.save(3, states[3], {"done": 3})
    store.finish(3, states[3], {"done": 3})
    store.close()
    assert clock.waited == [0.5, 1]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "3"]


def test_only_the_end_of_asyncios_loop_is_hidden(monkeypatch):
    shown, hooks = [], (sys.excepthook, sys.unraisablehook)
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(str(error[1])))
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(str(found.exc_value)))
    with quiet_failures():
        for text in ("Event loop is closed", "another"):
            error = RuntimeError(text)
            sys.excepthook(RuntimeError, error, None)
            sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert shown == ["another"] * 2
    sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
    assert len(shown) == 3
    monkeypatch.undo()
    assert (sys.excepthook, sys.unraisablehook) == hooks


def test_a_folder_without_a_record_gets_no_usage(tmp_path):
    write_usage(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / RECORD).write_text("{}")
    write_usage(tmp_path)
    assert (tmp_path / USAGE).exists()


def test_a_copy_in_the_place_of_the_folder_is_used(clock, states, tmp_path):
    folder = tmp_path / "run/checkpoints"
    store = Checkpoints(folder, keep=None)
    store.save(1, states[1], {"done": 1})
    store.finish(1, states[1], {"done": 1})
    (folder.parent / "run.json").write_text("{}")
    folder.parent.rename(tmp_path / "away")
    shutil.copytree(tmp_path / "away", folder.parent)
    store.save(2, states[2], {"done": 2})
    store.finish(2, states[2], {"done": 2})
    store.close()
    assert not clock.waited
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_folder_that_vanished_is_not_made_anew(clock, states, tmp_path):
    store = Checkpoints(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(StorageError, match=r"No such file or directory.*Nothing in it has changed"):
        store.save(1, states[1], {"done": 1})
    assert clock.waited == ALL
    assert not (tmp_path / "c").exists()


def test_the_command_ends_with_status_74_and_resumes_where_it_was(
    chat_models, clock, limit, tmp_path, capfd, monkeypatch
):
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", save_every=1, steps=3)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    command = ["sft", str(tmp_path / "sft.yaml")]
    whole = [*command, f"run.folder={tmp_path / 'whole'}"]
    assert cli.main(whole) == 0
    plain = JsonlWriter.write

    def write(self, step, metrics):
        plain(self, step, metrics)
        if step == 2:
            while not (tmp_path / "run/checkpoints/1").exists():
                time.sleep(0.01)
            limit(60_000)  # the arrays of the next checkpoint are larger

    with monkeypatch.context() as patch:
        patch.setattr(JsonlWriter, "write", write)
        assert cli.main(command) == 74
    limit(None)
    said = capfd.readouterr().err
    assert "File too large" in said
    assert f"go on with: jaxalign sft {tmp_path / 'sft.yaml'} run.resume=auto" in said
    assert "Traceback" not in said
    assert cli.main([*command, "run.resume=true"]) == 0
    ours, theirs = chatmodel.lines(tmp_path / "run"), chatmodel.lines(tmp_path / "whole")
    assert chatmodel.timeless(ours) == chatmodel.timeless(theirs)
    assert chatmodel.weights(tmp_path / "run/model") == chatmodel.weights(tmp_path / "whole/model")


def test_a_lock_that_finds_no_room_is_not_left_behind(limit, tmp_path):
    limit(20)
    with (
        pytest.raises(OSError, match=r"File too large.*run/\.lock"),
        FolderLock(tmp_path / "run"),
    ):
        pass
    limit(None)
    assert not (tmp_path / "run").exists()
    (tmp_path / "x").write_text("before")
    limit(20)
    with pytest.raises(OSError, match=r"File too large.*/x'"):
        replace_text(tmp_path / "x", "after" * 20)
    limit(None)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


def test_output_on_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    """A log beside the run, on the same disk: steps go on where their text finds no room."""
    reporter = Reporter(tmp_path, "sft", total=2, done=0, log_every=1, make_bar=FullBar)
    record = StepRecord(1, [], {"loss": 1.0}, {}, lambda: [8, 8, 1, 0, 0, 8, 0, 1], 1)
    reporter.add(record._replace(updates=[{"loss": 1.0}]), keep=0)
    monkeypatch.setattr("sys.stdout", FullBar())
    storage.say("text")
    reporter.close()
    assert [row["step"] for row in chatmodel.lines(tmp_path)] == [1]


class FullBar:
    """A progress bar, or a file, that finds no room."""

    disable, desc = False, "sft"

    def __init__(self, *_):
        self.written = []

    def write(self, text):
        full()

    def set_postfix_str(self, text, refresh=True):
        pass

    def update(self):
        full()

    def flush(self):
        full()

    def close(self):
        pass
