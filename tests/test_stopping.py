"""The stop matrix: signals, time limits and kills, and that a run goes on afterwards.

Two processes: `tests/parallel/test_multihost.py`.
"""

import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import chatmodel
import pytest

from jaxalign.commands import cli
from jaxalign.parallel import distributed
from jaxalign.run import loop, reporter, stopping
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import write_yaml
from jaxalign.run.stopping import Clock

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture
def settings(chat_models, tmp_path):
    return chatmodel.settings("sft", chat_models, tmp_path / "run", steps=4, export=False)


@pytest.fixture(scope="module")
def wholes(chat_models, tmp_path_factory):
    """The metrics of a run that nothing stops, by algorithm."""

    @functools.cache
    def lines(algorithm):
        folder = tmp_path_factory.mktemp(algorithm) / "run"
        options = {"steps": 4, "export": False, "checkpoint": False}
        values = chatmodel.settings(algorithm, chat_models, folder, **options)
        return chatmodel.timeless(
            chatmodel.lines(loop.train(load_config(algorithm, values)).folder)
        )

    return lines


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(monkeypatch, step, number):
    """Sends this process a signal when the metrics of a step are read; None: it ends there."""
    check = reporter.check_finite

    def checked(metrics, at):
        check(metrics, at)
        if at == step and number is None:
            raise Killed
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(reporter, "check_finite", checked)


# Each signal and each algorithm at least once. Two steps are under way at a time, so that a signal
# that comes while step 1 is read leaves step 3 the last; in PPO, which waits for each, step 2.
MATRIX = [
    ("sft", signal.SIGTERM, 3),
    ("sft", signal.SIGINT, 3),
    *(
        pytest.param(algorithm, number, last, marks=pytest.mark.slow)
        for algorithm, number, last in (
            ("reward", signal.SIGUSR1, 3),
            ("dpo", signal.SIGHUP, 3),
            ("kto", signal.SIGINT, 3),
            ("ppo", signal.SIGTERM, 2),
        )
    ),
]


@pytest.mark.parametrize(("algorithm", "number", "last"), MATRIX)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    wholes, chat_models, tmp_path, monkeypatch, capfd, algorithm, number, last
):
    values = chatmodel.settings(algorithm, chat_models, tmp_path / "run", steps=4, export=False)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        kill_at(patch, 1, number)
        told = rf"stopped after step {last} of 4, as {number.name} came; run\.resume=true goes on"
        with pytest.raises(distributed.Preempted, match=told):
            loop.train(load_config(algorithm, values))
    assert signal.getsignal(number) is before
    assert f"jaxalign: {number.name}: the run saves a checkpoint" in capfd.readouterr().err
    resumed = loop.train(load_config(algorithm, values, ["run.resume=true"]))
    assert len(resumed.history) == 4 - last
    assert chatmodel.timeless(chatmodel.lines(resumed.folder)) == wholes(algorithm)


def test_the_second_ctrl_c_ends_at_once_and_loses_nothing_that_was_saved(settings, monkeypatch):
    settings["run"]["save_every"] = 1
    with monkeypatch.context() as patch:
        kill_at(patch, 2, signal.SIGINT)
        kill_at(patch, 2, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            loop.train(load_config("sft", settings))
    # The folder is free again, and what was saved is there.
    resumed = loop.train(load_config("sft", settings, ["run.resume=true"]))
    assert len(resumed.history) == 3
    assert [row["step"] for row in chatmodel.lines(resumed.folder)] == [1, 2, 3, 4]


def test_a_signal_while_a_run_is_set_up_ends_it_before_its_first_step(settings, monkeypatch):
    make = loop.make_task

    def slow(config):
        os.kill(os.getpid(), signal.SIGTERM)
        return make(config)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_task", slow)
        with pytest.raises(distributed.Preempted, match="before step 1, as SIGTERM came"):
            loop.train(load_config("sft", settings))
    assert len(loop.train(load_config("sft", settings, ["run.resume=auto"])).history) == 4


def test_the_message_is_the_command_that_goes_on(settings, tmp_path, monkeypatch, capsys):
    path = tmp_path / "my run.yaml"
    write_yaml(path, settings)
    with monkeypatch.context() as patch:
        kill_at(patch, 1, signal.SIGTERM)
        command = ["sft", str(path), "optimizer.b1=0.8", "run.overwrite=true"]
        assert cli.main(command) == 75
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert line == f"go on with: jaxalign sft '{path}' optimizer.b1=0.8 run.resume=auto"
    assert cli.main(shlex.split(line.partition(": jaxalign ")[2])) == 0
    assert [row["step"] for row in chatmodel.lines(settings["run"]["folder"])] == [1, 2, 3, 4]
    assert "resuming after step 3 of 4" in capsys.readouterr().out


def test_a_pipeline_goes_on_in_the_stage_that_was_stopped(
    settings, chat_models, tmp_path, monkeypatch, capsys
):
    stage = {name: value for name, value in settings.items() if name != "run"}
    run = {"steps": 2, "export": False, "log_every": 100}
    stages = [{"name": name, "algorithm": "sft", "run": run} | stage for name in ("a", "b")]
    write_yaml(tmp_path / "all.yaml", {"folder": str(tmp_path / "all"), "stages": stages})
    command = ["pipeline", str(tmp_path / "all.yaml")]
    with monkeypatch.context() as patch:
        kill_at(patch, 1, signal.SIGTERM)
        assert cli.main(command) == 75
    *_, said, line = capsys.readouterr().err.splitlines()
    # It came while the last step of the stage was under way: that stage is done.
    assert "stopped after the stage a, as SIGTERM came" in said
    assert not (tmp_path / "all/b").exists()
    assert line.endswith("all.yaml defaults.run.resume=auto")
    # `true` does as well: a stage that was not reached starts.
    assert cli.main([*command, "defaults.run.resume=true"]) == 0
    for name in ("a", "b"):
        assert [row["step"] for row in chatmodel.lines(tmp_path / "all" / name)] == [1, 2]


# --- the clock ------------------------------------------------------------------------------------


def test_the_clock_asks_for_a_checkpoint_every_so_often():
    at = [0.0]
    clock = Clock(10, None, now=lambda: at[0])
    asked = []
    for minute in range(1, 36):
        at[0] = 60.0 * minute
        wishes = clock.after_step()
        assert not wishes.stop
        if wishes.save:
            asked.append(minute)
            clock.saved()
    assert asked == [10, 20, 30]
    assert not Clock(None, None, now=lambda: at[0]).after_step().save


def test_the_clock_ends_a_run_before_the_step_that_would_be_too_long():
    at = [0.0]
    clock = Clock(None, 60, began=0.0, now=lambda: at[0])
    at[0] = 20 * 60.0  # models were loaded, programs compiled
    clock.start_step()
    stops = {}
    for minute in (25, 33, 45, 52):  # the longest step so far took 5, 8, 12, 12 minutes
        at[0] = 60.0 * minute
        stops[minute] = clock.after_step().stop
    assert stops == {25: False, 33: False, 45: False, 52: True}


def test_a_time_limit_saves_and_stops(settings):
    told = r"after step 1 of 4, as run\.time_limit=1e-06 minutes leave no time"
    with pytest.raises(distributed.Preempted, match=told):
        loop.train(load_config("sft", settings, ["run.time_limit=1e-6"]))
    assert len(loop.train(load_config("sft", settings, ["run.resume=true"])).history) == 3


def test_the_clock_saves_between_steps(settings, monkeypatch):
    """So that a run that never names `save_every` loses minutes, not days."""
    with monkeypatch.context() as patch:
        kill_at(patch, 3, None)
        with pytest.raises(Killed):
            loop.train(load_config("sft", settings, ["run.save_minutes=1e-9"]))
    resumed = loop.train(load_config("sft", settings, ["run.resume=true"]))
    assert len(resumed.history) == 2


def test_without_checkpoints_the_message_says_that_nothing_is_saved(settings, monkeypatch):
    kill_at(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(distributed.Preempted, match=r"run\.checkpoint=false: nothing"):
        loop.train(load_config("sft", settings, ["run.checkpoint=false"]))


def test_the_second_signal_acts_as_usual():
    with stopping.stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with stopping.stop_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


# --- kill -9 --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_a_process_that_is_killed_leaves_a_run_that_goes_on(chat_models, tmp_path, algorithm):
    values = chatmodel.settings(algorithm, chat_models, tmp_path / "run", steps=1_000_000)
    values["run"] |= {"save_every": 1, "export": False}
    write_yaml(tmp_path / "run.yaml", values)
    command = [sys.executable, "-m", "jaxalign", algorithm, str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (tmp_path / "run/checkpoints/2").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    ends = [f"run.steps={6}", f"run.folder={tmp_path / 'whole'}"]
    whole = loop.train(load_config(algorithm, values, ends))
    done = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()
               if path.name.isdecimal())  # fmt: skip
    steps = max(6, done)
    again = [f"run.steps={steps}", "run.resume=true"]
    resumed = loop.train(load_config(algorithm, values, again))
    ours, theirs = (chatmodel.lines(result.folder)[:6] for result in (resumed, whole))
    assert chatmodel.timeless(ours) == chatmodel.timeless(theirs)
