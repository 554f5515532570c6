"""HTTP rewards against a small server: protocol, retries and failures."""

import contextlib
import json
import socketserver
import threading
import time

import numpy as np
import pytest
import writers
from answered import TOK, answered

from jaxalign.rewards import RewardError, combine_rewards, http_reward
from jaxalign.rewards.http import PostError, pauses, post, say_pause

BATCH = answered([("p one", "a"), ("p two", "bb"), ("p three", "ccc"), ("", "")])
ROWS = [{"answer": 4}, {"answer": "x"}, {"answer": None}]


def lengths(body, number):
    """(status, headers, body) of a working server."""
    return 200, {}, json.dumps({"scores": [len(c) for c in body["completions"]]}).encode()


def failing(times, status=503, headers=None, raw=b"busy"):
    """A server whose first responses differ."""

    def answer(body, number):
        return (status, headers or {}, raw) if number <= times else lengths(body, number)

    return answer


def reward(server, **options):
    options = {"timeout": 600.0, "backoff": 0.01} | options
    return http_reward(server.address, TOK, **options)


def test_request_and_response(monkeypatch):
    monkeypatch.setenv("MY_KEY", " secret-1 ")
    with writers.serving(lengths) as server:
        scores = reward(server, rows=ROWS, batch=2, key_variable="MY_KEY")(*BATCH)
    np.testing.assert_array_equal(scores, [1, 2, 3, 0])
    bodies = sorted((body for _, _, body in server.seen), key=lambda body: len(body["rows"]))
    assert bodies == [
        {"prompts": ["p three"], "completions": ["ccc"], "rows": [{"answer": None}]},
        {"prompts": ["p one", "p two"], "completions": ["a", "bb"], "rows": ROWS[:2]},
    ]
    for path, headers, _ in server.seen:
        assert path == "/v1"
        assert headers["Content-Type"] == "application/json"
        assert headers["Authorization"] == "Bearer secret-1"


def test_without_rows_and_key():
    with writers.serving(lengths) as server:
        reward(server)(*BATCH)
    ((_, headers, body),) = server.seen
    assert body["rows"] == [{}, {}, {}]
    assert "Authorization" not in headers


def test_temporary_failure_is_retried():
    with writers.serving(failing(2)) as server:
        np.testing.assert_array_equal(reward(server, max_failures=3)(*BATCH), [1, 2, 3, 0])
    assert len(server.seen) == 3
    assert server.seen[0][2] == server.seen[2][2]


def test_failures_are_bounded_and_named():
    with writers.serving(failing(99)) as server:
        with pytest.raises(RewardError) as caught:
            reward(server, max_failures=3, name="judge")(*BATCH)
        message = str(caught.value)
    assert len(server.seen) == 3
    assert f"reward 'judge': {server.address} failed 3 times in a row" in message
    assert "HTTP 503" in message
    assert "busy" in message
    assert (
        "3 answers have no score, the first of them row 0 of the batch, prompt 'p one'" in message
    )


def test_permanent_failure_stops_other_requests():
    def answer(body, number):
        bad = body["completions"] == ["bb"]
        return (500, {}, b"") if bad else lengths(body, number)

    with writers.serving(answer) as server, pytest.raises(RewardError, match="prompt 'p two'"):
        reward(server, batch=1, concurrency=1, max_failures=2)(*BATCH)
    # The first request; the second and its retry; never the third.
    assert [body["completions"] for _, _, body in server.seen] == [["a"], ["bb"], ["bb"]]


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_refusal_is_not_retried(status):
    key = {"Location": "http://127.0.0.1:1/"}
    with writers.serving(failing(99, status, key)) as server:
        with pytest.raises(
            RewardError, match=f"failed 1 times in a row, the last with HTTP {status}"
        ):
            reward(server)(*BATCH)
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"scores": [1, 2]}', r"answered '\{.*wanted .* with 3 numbers"),
        (b'{"rewards": [1, 2, 3]}', "wanted .*scores"),
        (b"[1, 2, 3]", "wanted .*scores"),
        (b"<html>", "wanted .*scores"),
        (b'{"scores": [1, NaN, 3]}', r"reward 'http' gave nan for row 1 .*prompt 'p two'"),
        (b'{"scores": [1, 2, 1e999]}', r"gave inf for row 2"),
        (b'{"scores": [1, 2, 1e39]}', r"gave 1e\+39 for row 2 .*wanted a finite number of at most"),
        (b'{"scores": [1, 2, ' + b"9" * 300 + b"]}", "gave 9999.* for row 2"),
        (b'{"scores": [1, 2, ' + b"9" * 4000 + b"]}", "wanted .*scores"),
        (b"[" * 100_000, "wanted .*scores"),
        (b'{"scores": [1, 2, "3"]}', r"gave '3' for row 2"),
    ],
)
def test_response_without_scores_raises(raw, message):
    with writers.serving(lambda body, number: (200, {}, raw)) as server:
        with pytest.raises(RewardError, match=message):
            reward(server)(*BATCH)
        assert len(server.seen) == 1


def test_null_does_not_apply():
    raw = b'{"scores": [1, null, 3]}'
    with writers.serving(lambda body, number: (200, {}, raw)) as server:
        both = combine_rewards({"http": reward(server), "one": lambda t, p: np.ones(4)})
        scores = both(*BATCH)
    np.testing.assert_array_equal(scores.values, [2, 1, 4, 0])
    np.testing.assert_array_equal(scores.parts["http"].applies, [True, False, True, False])


def test_slow_response_times_out():
    release = threading.Event()

    def slow(body, number):
        release.wait()
        return lengths(body, number)

    with writers.serving(slow) as server:
        try:
            with pytest.raises(RewardError, match=r"failed 2 times in a row, the last with.*time"):
                reward(server, timeout=0.05, max_failures=2)(*BATCH)
        finally:
            release.set()  # only now does the server answer


def dripping(start, end):
    """A server that sends `start`, then header lines or a body bit by bit, and `end` after 5 s."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):  # the client hangs up
                self.request.recv(65536)
                self.request.sendall(start)
                for number in range(100):
                    time.sleep(0.05)
                    self.request.sendall(b"X-%d: y\r\n" % number)
                self.request.sendall(end)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    return Server(("127.0.0.1", 0), Handler)


SCORES = b'Content-Length: 21\r\n\r\n{"scores": [1, 2, 3]}'


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (b"HTTP/1.1 200 OK\r\n", SCORES),
        (b"HTTP/1.1 200 OK\r\n\r\n", b""),
        (b"HTTP/1.1 500 Oops\r\n\r\n", b""),
        (b"HTTP/1.1 401 No\r\nContent-Length: 9999\r\n\r\n", b""),
    ],
    ids=["headers", "body", "body of a 500", "body of a 401"],
)
def test_a_server_that_drips_runs_into_the_deadline(monkeypatch, start, end):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with dripping(start, end) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        message = r"failed 2 times in a row, the last with TimeoutError: "
        with pytest.raises(RewardError, match=message):
            http_reward(url, TOK, timeout=0.1, max_failures=2, backoff=0.0)(*BATCH)
        server.shutdown()


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("1e9", 600.0),
        ("inf", 600.0),
        ("-5", 0.0),
        ("nan", None),
        ("9" * 5000, 600.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600.0),
        ("Fri, 99 Dec 2026 23:59:59 GMT", None),
        ("soon", None),
    ],
)
def test_retry_after_is_bounded(value, wait):
    server = writers.serving(failing(99, headers={"Retry-After": value}))
    with server as running, pytest.raises(PostError) as caught:
        post(running.address, b"{}", {}, 600.0)
    assert caught.value.wait == wait
    assert caught.value.again


def test_long_pauses_are_said(capsys):
    say_pause("http://x/", PostError("HTTP 503 busy", 503, True, 29.0), 29.0)
    say_pause("http://x/", PostError("HTTP 503 busy", 503, True, 600.0), 600.0)
    assert capsys.readouterr().out == "http://x/: HTTP 503 busy; the next try is in 600 s\n"


def test_connection_refused():
    with writers.serving(lengths) as server:
        pass
    with pytest.raises(RewardError, match=r"failed 2 times.*ConnectionRefused"):
        reward(server, max_failures=2)(*BATCH)


def test_concurrency_is_bounded():
    at_once, most = [], []

    def answer(body, number):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.pop()
        return lengths(body, number)

    batch = answered([(str(n), "x" * (n + 1)) for n in range(6)])
    with writers.serving(answer) as server:
        np.testing.assert_array_equal(
            reward(server, batch=1, concurrency=2)(*batch), [1, 2, 3, 4, 5, 6]
        )
    assert max(most) <= 2


def test_row_that_json_cannot_represent():
    rows = [{"when": object()}] * 3
    with (
        writers.serving(lengths) as server,
        pytest.raises(RewardError, match=r"row 0 .* cannot be sent as JSON"),
    ):
        reward(server, rows=rows)(*BATCH)
    assert not server.seen


def test_key_is_redacted_from_messages(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    with (
        writers.serving(failing(99, 403, raw=b"no secret-1 here")) as server,
        pytest.raises(RewardError) as caught,
    ):
        reward(server, key_variable="MY_KEY")(*BATCH)
    assert "secret-1" not in str(caught.value)
    assert "[key]" in str(caught.value)
    monkeypatch.setenv("MY_KEY", "")
    with pytest.raises(ValueError, match="MY_KEY: wanted a key"):
        reward(server, key_variable="MY_KEY")


def test_pauses_double_up_to_a_minute_and_come_from_the_seed():
    import random

    drawn = [wait for wait, _ in zip(pauses(4.0, random.Random("7 0")), range(8), strict=False)]
    longest = [4, 8, 16, 32, 60, 60, 60, 60]
    assert all(0.5 * top <= wait <= top for wait, top in zip(drawn, longest, strict=True))
    again = [wait for wait, _ in zip(pauses(4.0, random.Random("7 0")), range(8), strict=False)]
    assert drawn == again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://x/"}, "url: wanted http"),
        ({"url": "http://user:word@x/"}, "url: wanted http"),
        ({"timeout": 0}, "timeout=0"),
        ({"backoff": -1}, "backoff=-1"),
        ({"max_failures": 0}, "max_failures=0"),
        ({"batch": 0}, "batch=0"),
        ({"concurrency": 0}, "concurrency=0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        http_reward(**{"url": "http://x/", "tok": TOK} | options)
    assert "word" not in str(caught.value)
