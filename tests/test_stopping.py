"""SIGTERM and Ctrl-C end a run on one process after the step under way, with a checkpoint."""

import os
import signal
import threading

import chatmodel
import pytest

from jaxalign.parallel import distributed
from jaxalign.run import loop, reporter, stopping
from jaxalign.run.config.runs import load_config

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture
def settings(chat_models, tmp_path):
    return chatmodel.settings("sft", chat_models, tmp_path / "run", steps=4, export=False)


def kill_at(monkeypatch, step, number):
    """Sends this process a signal when the metrics of a step are read."""
    check = reporter.check_finite

    def checked(metrics, at):
        check(metrics, at)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(reporter, "check_finite", checked)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    settings, chat_models, tmp_path, monkeypatch, number
):
    whole = loop.train(load_config("sft", settings, [f"run.folder={tmp_path / 'whole'}"]))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        kill_at(patch, 1, number)
        # Step 1 is read while step 2 runs: the signal comes in time for step 3 to be the last.
        told = rf"stopped after step 3 of 4, as {number.name} came; run\.resume=true goes on"
        with pytest.raises(distributed.Preempted, match=told):
            loop.train(load_config("sft", settings))
    assert signal.getsignal(number) is before
    resumed = loop.train(load_config("sft", settings, ["run.resume=true"]))
    assert len(resumed.history) == 1
    ours, theirs = (chatmodel.lines(result.folder) for result in (resumed, whole))
    assert chatmodel.timeless(ours) == chatmodel.timeless(theirs)


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
