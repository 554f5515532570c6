"""A writer behind HTTP: any server that speaks OpenAI's chat completions.

The key goes into one header and nowhere else. Error messages that repeat it are redacted; no file
contains it; and redirects are refused, so no other host receives it.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxalign.commands.synth.config import ServerConfig
from jaxalign.commands.synth.writer import REFUSED, Reply, Request, now
from jaxalign.data.bounds import parse_json
from jaxalign.rewards.http import PostError, check_url, pauses, post, say_pause

_REFUSED = (400, 413, 422)


class ServerError(ConnectionError):
    """The server did not answer, in spite of all retries."""


class _Retry(Exception):
    """This try failed, another may not."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


class _Refused(Exception):
    """The server does not want this prompt."""


class _Cancelled(Exception):
    """Another request failed for good."""


class ServerWriter:
    """Sends requests to a server, several at a time.

    Args:
      model: its name at the server.
      config: address, key, timeouts and retries.
      concurrency: requests at a time.
      environment: holds address and key unless the configuration has them.

    Raises:
      ValueError: no address, one that is not http or https, or a key that no header can hold.
    """

    def __init__(
        self,
        model: str,
        config: ServerConfig,
        concurrency: int,
        environment: Mapping[str, str] = os.environ,
    ):
        self.name = model
        self._config = config
        self._concurrency = concurrency
        self._url = _address(config, environment) + "/chat/completions"
        self._key = _key(config, environment)
        self._refusals = 0  # one after the other

    def write(
        self, requests: Sequence[Request], missing: Collection[int]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Writer`.

        Raises:
          ServerError: a request failed after all its retries. Replies under way are yielded first.
          ValueError: the server refuses the key, the model or the address, or too many prompts.
        """
        stop = threading.Event()
        failure: BaseException | None = None
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as threads:
            places = {threads.submit(self._ask, requests[i], stop): i for i in missing}
            try:
                for future in concurrent.futures.as_completed(places):
                    if future.cancelled():
                        continue
                    try:
                        reply = future.result()
                        self._count(reply)
                    except _Cancelled:
                        continue
                    except (ValueError, OSError) as error:
                        failure = error if failure is None else failure
                        stop.set()
                        for other in places:
                            other.cancel()
                    else:
                        yield places[future], reply
            finally:
                stop.set()
                for future in places:
                    future.cancel()
        if failure is not None:
            raise failure

    def _count(self, reply: Reply) -> None:
        self._refusals = self._refusals + 1 if reply.finish == REFUSED else 0
        if self._refusals >= self._config.max_refusals:
            raise ValueError(
                f"{self._url}: refused {self._refusals} requests one after the other, the last "
                f"with {reply.text}; correct the writer's settings, or raise server.max_refusals"
            )

    def _ask(self, request: Request, stop: threading.Event) -> Reply:
        body = self._body(request)
        waits = pauses(self._config.backoff, random.Random())
        attempt = 0
        while True:
            if stop.is_set():
                raise _Cancelled
            try:
                return _reply(self._post(body))
            except ValueError:
                stop.set()  # here, before this thread takes up the next request
                raise
            except _Refused as refusal:
                return Reply(str(refusal), REFUSED, now())
            except _Retry as failure:
                attempt += 1
                if attempt > self._config.retries:
                    stop.set()
                    raise ServerError(
                        f"{self._url}: no answer to {request.name!r} in {attempt} tries, the "
                        f"last failed with {failure}; what came before is kept: give the same "
                        "command again when the server answers"
                    ) from None
                pause = max(next(waits), failure.wait or 0.0)
                say_pause(self._url, failure, pause)
                stop.wait(pause)

    def _body(self, request: Request) -> bytes:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(request.messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._config.limit_field: sampling.max_tokens,
        }
        if self._config.send_seed:
            body["seed"] = request.seed
        return json.dumps(body).encode()

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "jaxalign"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            return post(self._url, body, headers, self._config.timeout, self._key)
        except PostError as error:
            raise self._failure(error) from None

    def _failure(self, error: PostError) -> Exception:
        if error.again:
            return _Retry(str(error), error.wait)
        if error.status in _REFUSED:
            return _Refused(str(error))
        remedy = "the writer's address and model"
        if error.status in (401, 403):
            where = "server.key" if self._config.key is not None else self._config.key_variable
            remedy = f"the key in {where}" if self._key is not None else f"a key, in {where}"
        return ValueError(f"{self._url}: {error}; wanted status 200; check {remedy}")


def _address(config: ServerConfig, environment: Mapping[str, str]) -> str:
    name = "server.address"
    address = config.address
    if address is None:
        name = config.address_variable
        address = environment.get(name, "").strip()
        if not address:
            raise ValueError(
                f"server.address: missing, and {name} is not set; give the base address of a "
                "server, such as http://localhost:8000/v1"
            )
    check_url(address, name, "http://host:port/v1")
    return address.rstrip("/")


def _key(config: ServerConfig, environment: Mapping[str, str]) -> str | None:
    key, name = config.key, "server.key"
    if key is None:
        name = config.key_variable
        key = environment.get(name, "").strip()
        if not key:
            return None
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError(f"{name}: wanted a key of printable ASCII without spaces; correct it")
    return key


def _reply(raw: str) -> Reply:
    """A chat completion → the reply; raises `_Retry` for anything else."""
    try:
        answer = parse_json(raw)
        choice = answer["choices"][0]
        text = choice["message"].get("content")
        finish = choice.get("finish_reason")
        usage = answer.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Retry(f"no chat completion: {raw[:200]!r}") from None
    text = "" if text is None else text
    if not isinstance(text, str):
        raise _Retry(f"a completion whose content is no text, but a {type(text).__name__}")
    # Half a surrogate pair could not be written to a file.
    text = text.encode("utf-8", "replace").decode()
    finish = finish if isinstance(finish, str) else "stop"
    return Reply(text, finish, now(), tokens if isinstance(tokens, int) else None)
