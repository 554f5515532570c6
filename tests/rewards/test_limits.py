"""Reward functions and patterns that do not come back, and ones that leave."""

import signal
import sys
import threading
import time

import pytest
from answered import TOK, answered

from jaxalign.rewards import (
    FunctionReward,
    RewardError,
    batch_reward,
    combine_rewards,
    text_reward,
)
from jaxalign.rewards.function import import_function
from jaxalign.rewards.limits import OutOfTime, call_within
from jaxalign.rewards.regex import RegexReward
from jaxalign.rewards.specs import BuildContext

BATCH = answered([("p one", "a" * 35 + "!"), ("p two", "b")])
CONTEXT = BuildContext(tok=TOK, rows=None, name="mine")


def leave(prompt, completion):
    sys.exit(0)


def leave_all(prompts, completions):
    raise SystemExit("done")


def endless(prompt, completion):
    while True:
        time.sleep(0.01)


def endless_all(prompts, completions):
    return [endless(*pair) for pair in zip(prompts, completions, strict=True)]


def alarm():
    """The handler of the alarm signal, and whether an alarm is set, as for slow tests."""
    return signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0


def stubborn(prompt, completion):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            text_reward(leave, TOK),
            r"'leave' failed for row 0 .*'p one': it called sys\.exit\(0\) at",
        ),
        (
            batch_reward(leave_all, TOK),
            r"for 2 answers, .*: it called sys\.exit\('done'\) at .*\.py",
        ),
    ],
)
def test_sys_exit_is_an_error(reward, message):
    with pytest.raises(RewardError, match=message):
        reward(*BATCH)


def test_sys_exit_of_a_reward_on_tokens_is_an_error():
    def tokens_reward(tokens, prompts):
        sys.exit(3)

    with pytest.raises(RewardError, match=r"reward 'x' failed: it called sys\.exit\(3\)"):
        combine_rewards({"x": tokens_reward})(*BATCH)


def test_a_module_that_leaves_is_an_error(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\ndef f(p, c): return 1.0\nsys.exit()\n")
    with pytest.raises(ValueError, match=r"it calls sys\.exit\(None\) when it is imported"):
        import_function(f"{tmp_path / 'mine.py'}:f")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            text_reward(endless, TOK, timeout=0.05),
            r"'endless' failed for row 0 .*: no score within timeout=0\.05 s; raise it.*\.py:",
        ),
        (text_reward(stubborn, TOK, timeout=0.05), r"no score within timeout=0\.05 s"),
        (
            batch_reward(endless_all, TOK, timeout=0.05),
            "'endless_all' took longer than its timeout for 2 answers, the first of them row 0",
        ),
        (
            RegexReward(pattern="^(a+)+$", timeout=0.05).build(CONTEXT),
            r"reward 'mine' failed for row 0 .*: no score within timeout=0\.05 s",
        ),
    ],
)
def test_time_limits(reward, message):
    before = alarm()
    with pytest.raises(RewardError, match=message):
        reward(*BATCH)
    assert alarm() == before


def test_within_the_limit_nothing_changes():
    before = alarm()
    reward = RegexReward(pattern="^b$").build(CONTEXT)
    assert reward(*BATCH).tolist() == [0.0, 1.0]
    assert alarm() == before


def test_an_alarm_that_was_set_before_goes_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    rest, _ = signal.setitimer(signal.ITIMER_REAL, 3600.0)
    try:
        assert call_within(600.0, lambda: signal.getitimer(signal.ITIMER_REAL)[0]) <= 600.0
        assert 600.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 3600.0
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        call_within(600.0, time.sleep, 0.05)
        while not rung:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest)


def test_other_threads_have_no_limit():
    done = []
    thread = threading.Thread(
        target=lambda: done.append(call_within(0.01, lambda: time.sleep(0.05) or 1))
    )
    thread.start()
    thread.join()
    assert done == [1]


def test_a_limit_ends_with_its_call():
    with pytest.raises(OutOfTime):
        call_within(0.01, time.sleep, 60.0)
    time.sleep(0.02)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_timeouts_out_of_range(timeout):
    for make in (
        lambda: FunctionReward(path="m:f", timeout=timeout),
        lambda: RegexReward(pattern="a", timeout=timeout),
    ):
        with pytest.raises(ValueError, match=r"reward timeout=.*: wanted positive seconds, or n"):
            make()
