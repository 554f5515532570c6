"""Requests, replies, and what any writer does with them."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

STOP, LENGTH, REFUSED = "stop", "length", "refused"


class Sampling(NamedTuple):
    """How a reply is sampled: temperature (0: greedy), top_p (1: off), max_tokens."""

    temperature: float
    top_p: float
    max_tokens: int


class Request(NamedTuple):
    """One request to a writer.

    Attributes:
      name: its purpose, the same in every run: `round 3/prompt 1/tasks`.
      messages: OpenAI's messages.
      sampling: how the reply is sampled.
      seed: in [0, 2³¹), from the run's seed and the name.
    """

    name: str
    messages: Sequence[dict[str, Any]]
    sampling: Sampling
    seed: int


class Reply(NamedTuple):
    """A writer's reply.

    Attributes:
      text: the assistant's text; if refused, the server's reason.
      finish: "stop", "length" (cut off at max_tokens), "refused", or another word of the server.
      time: when it was written, ISO 8601 in UTC, to the second.
      tokens: its length in tokens; None if unknown.
    """

    text: str
    finish: str
    time: str
    tokens: int | None = None


class Writer(Protocol):
    """Writes replies.

    Attributes:
      name: of the model, for provenance.
    """

    name: str

    def write(
        self, requests: Sequence[Request], missing: Collection[int]
    ) -> Iterator[tuple[int, Reply]]:
        """Yields (index in `requests`, reply) for the requests whose index is in `missing`."""
        ...


class FunctionWriter:
    """A writer around a function from requests to (text, finish), in groups of one size.

    Groups are cut from all requests, missing or not: a resumed run passes the same groups to the
    function and gets the same replies.

    Args:
      name: of the model.
      function: requests → one (text, finish) each.
      rows: requests in a group.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Sequence[Request]], Sequence[tuple[str, str]]],
        rows: int,
    ):
        self.name = name
        self._function = function
        self._rows = rows

    def write(
        self, requests: Sequence[Request], missing: Collection[int]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Writer`."""
        missing = set(missing)
        for start in range(0, len(requests), self._rows):
            group = range(start, min(start + self._rows, len(requests)))
            if missing.isdisjoint(group):
                continue
            replies = self._function([requests[i] for i in group])
            for i, (text, finish) in zip(group, replies, strict=True):
                if i in missing:
                    yield i, Reply(text, finish, now())


def now() -> str:
    """The time, for provenance."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class RequestFactory:
    """Makes the requests of one run: seeds and sampling in one place.

    Attributes:
      seed: the run's seed.
      sampling: of replies that may differ.
    """

    seed: int
    sampling: Sampling

    def request(
        self, name: str, messages: str | Sequence[dict[str, Any]], exact: bool = False
    ) -> Request:
        """A request; `exact` makes the reply greedy. A string is one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        sampling = self.sampling._replace(temperature=0.0) if exact else self.sampling
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return Request(name, list(messages), sampling, int.from_bytes(digest[:4], "big") >> 1)


def prompt_hash(writer: str, request: Request) -> str:
    """16 hexadecimal digits that stand for writer, messages, sampling and seed of a request."""
    value = [writer, request.messages, request.sampling, request.seed]
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
