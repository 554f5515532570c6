"""The writer behind HTTP, against a small server: what is sent, and what is done when it fails."""

import json
import threading
import time
import types

import pytest
import writers

from jaxalign.commands.synth import (
    Journal,
    RequestFactory,
    Sampling,
    ServerConfig,
    ServerError,
    ServerWriter,
)

KEY = "sk-very-secret-0123456789"
FACTORY = RequestFactory(0, Sampling(0.5, 0.9, 50))
REQUESTS = [FACTORY.request(f"request {n}", f"Question {n}") for n in range(4)]


def writer(server, concurrency=2, environment=None, **options):
    options = {"address": server.address, "backoff": 0.01, "timeout": 600.0} | options
    environment = {"OPENAI_API_KEY": KEY} if environment is None else environment
    return ServerWriter("some-model", ServerConfig(**options), concurrency, environment)


def ask(writer, requests=REQUESTS):
    return dict(writer.write(requests, range(len(requests))))


def failing(times, status=500, headers=None, raw=b"no"):
    """A server whose first answers are something else."""

    def answer(body, number):
        if number <= times:
            return status, {} if headers is None else headers, raw
        return writers.friendly(body, number)

    return answer


def test_what_is_sent_and_what_comes_back():
    with writers.serving() as server:
        replies = ask(writer(server))
    assert sorted(replies) == [0, 1, 2, 3]
    for n, reply in replies.items():
        assert reply.text == writers.play(f"Question {n}")
        assert (reply.finish, reply.tokens) == ("stop", 3)
    seeds = set()
    for path, headers, body in server.seen:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert headers["Content-Type"] == "application/json"
        seeds.add(body.pop("seed"))
        assert body.pop("messages")[0]["role"] == "user"
        assert body == {
            "model": "some-model",
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 50,
        }
    assert len(seeds) == 4


def test_options_of_the_request():
    with writers.serving() as server:
        options = {"limit_field": "max_completion_tokens", "send_seed": False}
        ask(writer(server, environment={}, **options), REQUESTS[:1])
    _, headers, body = server.seen[0]
    assert "Authorization" not in headers
    assert body["max_completion_tokens"] == 50
    assert not {"max_tokens", "seed"} & set(body)


def test_address_and_key_from_the_environment():
    with writers.serving() as server:
        environment = {"MY_URL": server.address + "/", "MY_KEY": f" {KEY}\n"}
        config = ServerConfig(address_variable="MY_URL", key_variable="MY_KEY")
        assert len(ask(ServerWriter("m", config, 1, environment))) == 4
        config = ServerConfig(address=server.address, key="from-config")
        ask(ServerWriter("m", config, 1, {"OPENAI_API_KEY": KEY}), REQUESTS[:1])
    sent = [headers["Authorization"] for _, headers, _ in server.seen]
    assert sent == [f"Bearer {KEY}"] * 4 + ["Bearer from-config"]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_it_asks_again(status):
    with writers.serving(failing(2, status)) as server:
        assert ask(writer(server), REQUESTS[:1])[0].text == writers.play("Question 0")
    assert len(server.seen) == 3
    assert server.seen[0][2] == server.seen[2][2]


@pytest.mark.parametrize(
    "raw", [b"{half", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}']
)
def test_an_answer_that_cannot_be_read_is_asked_for_again(raw):
    with writers.serving(failing(1, 200, raw=raw)) as server:
        assert len(ask(writer(server), REQUESTS[:1])) == 1
    with writers.serving(failing(99, 200, raw=raw)) as server, pytest.raises(ServerError) as caught:
        ask(writer(server, retries=1), REQUESTS[:1])
    assert "in 2 tries" in str(caught.value)
    assert "complet" in str(caught.value)


def test_the_server_says_how_long_to_wait(monkeypatch):
    waits = []

    class Hasty(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    monkeypatch.setattr(
        "jaxalign.commands.synth.server.threading", types.SimpleNamespace(Event=Hasty)
    )
    with writers.serving(failing(1, 429, {"Retry-After": "300"})) as server:
        ask(writer(server), REQUESTS[:1])
    assert waits == [300]


def test_a_connection_that_breaks_off_is_tried_again():
    with writers.serving(failing(1, 200, {"Content-Length": "5000"}, b"{")) as server:
        assert len(ask(writer(server), REQUESTS[:1])) == 1
        assert len(server.seen) == 2


def test_failures_for_ever_end_with_a_clear_error_and_keep_what_came(tmp_path):
    def answer(body, number):
        bad = body["messages"][0]["content"] == "Question 3"
        return (500, {}, b"broken " + KEY.encode()) if bad else writers.friendly(body, number)

    out = tmp_path / "out.jsonl"
    with writers.serving(answer) as server:
        journal = Journal(out)
        with pytest.raises(ServerError, match="no answer to 'request 3' in 3 tries") as caught:
            journal.ask(writer(server, retries=2), REQUESTS)
        journal.close()
        message = str(caught.value)
        assert "HTTP 500" in message
        assert "give the same command again" in message
        assert KEY not in message
        assert "broken [key]" in message
        assert sum(b["messages"][0]["content"] == "Question 3" for *_, b in server.seen) == 3

        server.answer = writers.friendly
        before = len(server.seen)
        journal = Journal(out)
        assert [reply.finish for reply in journal.ask(writer(server), REQUESTS)] == ["stop"] * 4
        journal.close()
        assert len(server.seen) == before + 1
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "request 3" in kept
    assert KEY not in kept


@pytest.mark.parametrize(
    ("status", "message"), [(401, "the key in OPENAI_API_KEY"), (404, "address")]
)
def test_a_wrong_key_or_address_stops_at_once(status, message):
    wrong = failing(99, status, raw=f"Incorrect key {KEY}".encode())
    with writers.serving(wrong) as server, pytest.raises(ValueError, match=message) as caught:
        ask(writer(server, concurrency=1))
    assert len(server.seen) == 1
    assert KEY not in str(caught.value)
    assert "Incorrect key [key]" in str(caught.value)


def test_a_redirect_is_not_followed_with_the_key():
    with writers.serving() as other:
        moved = failing(99, 302, {"Location": f"{other.address}/chat/completions"})
        with writers.serving(moved) as server, pytest.raises(ValueError, match="HTTP 302"):
            ask(writer(server), REQUESTS[:1])
    assert other.seen == []


def test_a_slow_server_is_not_waited_for():
    release = threading.Event()

    def slow(body, number):
        if number == 1:
            release.wait()
        return writers.friendly(body, number)

    with writers.serving(slow) as server:
        try:  # a busy machine may be slow as well, so it may ask more than twice
            replies = ask(writer(server, timeout=0.3, retries=1000), REQUESTS[:1])
        finally:
            release.set()  # only now does the server answer the first time
    assert len(replies) == 1
    assert len(server.seen) >= 2


def test_nobody_there():
    with writers.serving() as server:
        pass
    with pytest.raises(ServerError, match=r"in 2 tries.*ConnectionRefusedError"):
        ask(writer(server, retries=1), REQUESTS[:1])


def test_a_refused_prompt_is_counted_and_the_run_goes_on(tmp_path):
    def answer(body, number):
        bad = body["messages"][0]["content"] == "Question 1"
        return (400, {}, b"not that") if bad else writers.friendly(body, number)

    with writers.serving(answer) as server:
        for _ in range(2):  # the second time from the journal
            journal = Journal(tmp_path / "out.jsonl")
            replies = journal.ask(writer(server), REQUESTS)
            journal.close()
            assert [reply.finish for reply in replies] == ["stop", "refused", "stop", "stop"]
            assert replies[1].text == "HTTP 400 Bad Request not that"
    assert len(server.seen) == 4


def test_refused_requests_stop_the_run_and_are_sent_again(tmp_path):
    with writers.serving(failing(10**6, 400, raw=b"unknown field seed")) as server:
        journal = Journal(tmp_path / "out.jsonl")
        with pytest.raises(ValueError, match=r"refused 3 requests.*unknown field seed"):
            journal.ask(writer(server, max_refusals=3, concurrency=1), REQUESTS)
        journal.close()
        server.answer = writers.friendly
        journal = Journal(tmp_path / "out.jsonl")
        assert [reply.finish for reply in journal.ask(writer(server), REQUESTS)] == ["stop"] * 4
        journal.close()


def test_no_more_requests_at_a_time_than_wanted():
    lock, now, most = threading.Lock(), 0, 0
    together = threading.Barrier(3)  # else a busy machine may never have three under way

    def answer(body, number):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait()
        time.sleep(0.05)  # for one too many to come
        with lock:
            now -= 1
        return writers.friendly(body, number)

    requests = [FACTORY.request(str(n), str(n)) for n in range(9)]
    with writers.serving(answer) as server:
        assert len(ask(writer(server, concurrency=3), requests)) == 9
    assert most == 3


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({}, {}, "server.address: missing, and OPENAI_BASE_URL is not set"),
        ({"address": "localhost:8000"}, {}, "server.address: wanted http://"),
        ({"address": "file:///etc/passwd"}, {}, "server.address: wanted http://"),
        ({"address": "http://me:secret@host/v1"}, {}, "server.address: wanted http://"),
        ({"address": "http://host/v1?key=secret"}, {}, "server.address: wanted http://"),
        ({}, {"OPENAI_BASE_URL": "ftp://secret"}, "OPENAI_BASE_URL: wanted http://"),
        ({"address": "http://h", "key": "sec ret"}, {}, "server.key: wanted a key of printable"),
        (
            {"address": "http://h"},
            {"OPENAI_API_KEY": "secret\nX: y"},
            "OPENAI_API_KEY: wanted a key of printable",
        ),
    ],
)
def test_wrong_addresses_and_keys_are_named_not_shown(options, environment, message):
    with pytest.raises(ValueError, match=message) as caught:
        ServerWriter("m", ServerConfig(**options), 1, environment)
    assert "secret" not in str(caught.value)
    assert "sec ret" not in str(caught.value)


def test_the_key_is_not_in_the_repr_of_its_options():
    assert KEY not in repr(ServerConfig(key=KEY))


def test_content_that_is_missing_is_empty_and_half_a_surrogate_is_replaced():
    choice = {"message": {"role": "assistant", "content": None}, "finish_reason": "length"}
    with writers.serving(
        lambda *_: (200, {}, json.dumps({"choices": [choice]}).encode())
    ) as server:
        reply = ask(writer(server), REQUESTS[:1])[0]
    assert (reply.text, reply.finish, reply.tokens) == ("", "length", None)
    half = b'{"choices": [{"message": {"content": "a\\ud83db"}}]}'
    with writers.serving(lambda body, number: (200, {}, half)) as server:
        assert ask(writer(server), REQUESTS[:1])[0].text == "a?b"
