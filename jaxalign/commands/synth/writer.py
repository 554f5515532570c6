"""What is asked and what is answered, whoever writes."""

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
      name: what it is for, the same in every run: `round 3/prompt 1/tasks`.
      messages: OpenAI's messages.
      sampling: how the reply is sampled.
      seed: in [0, 2³¹), from the run's seed and the name.
    """

    name: str
    messages: Sequence[dict[str, Any]]
    sampling: Sampling
    seed: int


class Reply(NamedTuple):
    """What came back.

    Attributes:
      text: of the assistant; of a refusal the server's reason.
      finish: "stop", "length" (cut off at max_tokens) or "refused"; or what else a server says.
      time: when, ISO 8601 in UTC, seconds.
      tokens: how many it has, where that is known.
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
        """Replies to those requests that are missing, as (place in `requests`, reply)."""
        ...


class FunctionWriter:
    """A writer around a function from requests to (text, finish), in groups of one size.

    Groups are cut from all requests whether missing or not, so that a run that is continued asks
    the function for the same groups again and gets the same replies.

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
        wanted = set(missing)
        for start in range(0, len(requests), self._rows):
            group = range(start, min(start + self._rows, len(requests)))
            if wanted.isdisjoint(group):
                continue
            replies = self._function([requests[i] for i in group])
            for i, (text, finish) in zip(group, replies, strict=True):
                if i in wanted:
                    yield i, Reply(text, finish, now())


def now() -> str:
    """The time, for provenance."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class Asker:
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
        """A request; `exact` for greedy replies. A text is one user message."""
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        sampling = self.sampling._replace(temperature=0.0) if exact else self.sampling
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return Request(name, list(said), sampling, int.from_bytes(digest[:4], "big") >> 1)


def prompt_hash(writer: str, request: Request) -> str:
    """16 hexadecimal digits that stand for writer, messages, sampling and seed of a request."""
    value = [writer, request.messages, request.sampling, request.seed]
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
