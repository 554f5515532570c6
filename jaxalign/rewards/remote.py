"""Scores from a server, over HTTP.

A request holds some answers of a batch as JSON; the response has their scores in the same order:

    POST {"prompts": [text, …], "completions": [text, …], "rows": [{column: value, …}, …]}
    200  {"scores": [number or null, …]}

`rows` are the data rows (`{}` each, if there are none). A null score means that the reward does not
apply. A request with a temporary failure (no connection, a timeout, status 408, 409, 425, 429 or
5xx) is retried after a pause. The run stops if a request fails `max_failures` times in a row,
returns any other status, or returns no score for a completion: a failure never becomes a score.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
import random
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxalign.data.bounds import parse_json
from jaxalign.rewards.cases import Case, RewardError
from jaxalign.rewards.http import PostError, check_url, pauses, post, say_pause
from jaxalign.rewards.specs import BuildContext, RewardFunction, RewardSpec, register_reward
from jaxalign.rewards.text import TextReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def http_reward(
    url: str,
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any = None,
    name: str = "http",
    timeout: float = 30.0,
    max_failures: int = 5,
    backoff: float = 1.0,
    batch: int = 16,
    concurrency: int = 4,
    seed: int = 0,
    key_variable: str | None = None,
) -> TextReward:
    """A reward computed by a server; the module's docstring has the protocol.

    Args:
      url: http or https.
      tok: the policy's tokenizer.
      rows: see `jaxalign.rewards.text_reward`.
      name: the reward's name in errors.
      timeout: seconds per request, from the DNS look-up to the last byte.
      max_failures: consecutive failures of a request that stop the run; 1: no retry.
      backoff: longest first pause, in seconds; each later pause is twice as long, up to 60 s.
      batch: answers per request.
      concurrency: simultaneous requests.
      seed: seed of the pauses' jitter.
      key_variable: environment variable that holds a key, sent as `Authorization: Bearer`; None: no
        key is sent.

    Raises:
      ValueError: a URL that is not http or https, numbers out of range, or a `key_variable` that
        is not set.
    """
    check_http(url, timeout, max_failures, backoff, batch, concurrency)
    key = None if key_variable is None else os.environ.get(key_variable, "").strip()
    if key is not None and not (key and all("!" <= letter <= "~" for letter in key)):
        raise ValueError(f"{key_variable}: wanted a key of printable ASCII without spaces; set it")
    headers = {"Content-Type": "application/json", "User-Agent": "jaxalign"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"

    def request(cases: Sequence[Case], number: int, stop: threading.Event) -> list[Any]:
        body = _body(cases)
        waits = pauses(backoff, random.Random(f"{seed} {number}"))
        for failures in range(1, max_failures + 1):
            if stop.is_set():
                break  # another request failed permanently; its error is raised
            try:
                return _scores(post(url, body, headers, timeout, key), cases, url)
            except PostError as error:
                if not error.again or failures == max_failures:
                    stop.set()
                    raise RewardError(
                        f"{url} failed {failures} times in a row, the last with {error}; "
                        f"{len(cases)} answers have no score, the first of them {cases[0]}"
                    ) from None
                pause = max(next(waits), error.wait or 0.0)
                say_pause(url, error, pause)
                stop.wait(pause)
        return []

    def score_cases(cases: Sequence[Case]) -> list[float | None]:
        stop = threading.Event()
        parts = [cases[i : i + batch] for i in range(0, len(cases), batch)]
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(request, part, n, stop) for n, part in enumerate(parts)]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            finally:
                stop.set()
                for future in futures:
                    future.cancel()
        return [score for future in futures for score in future.result()]

    return TextReward(score_cases, tok, rows, name)


def check_http(
    url: str, timeout: float, max_failures: int, backoff: float, batch: int, concurrency: int
) -> None:
    """Checks the options of `http_reward`."""
    check_url(url, "http reward url", "http://host:port/path")
    for name, value in (
        ("max_failures", max_failures),
        ("batch", batch),
        ("concurrency", concurrency),
    ):
        if value < 1:
            raise ValueError(f"http reward {name}={value}: wanted a positive number")
    if not 0 < timeout < math.inf or not 0 <= backoff < math.inf:
        raise ValueError(
            f"http reward timeout={timeout}, backoff={backoff}: wanted positive seconds (backoff "
            "may be 0)"
        )


def _body(cases: Sequence[Case]) -> bytes:
    """The body of the request; every row must be JSON-able."""
    for case in cases:
        try:
            json.dumps(case.row, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RewardError(f"{case} cannot be sent as JSON: {error}") from None
    payload = {
        "prompts": [case.prompt for case in cases],
        "completions": [case.completion for case in cases],
        "rows": [{} if case.row is None else case.row for case in cases],
    }
    return json.dumps(payload).encode()


def _scores(raw: str, cases: Sequence[Case], url: str) -> list[Any]:
    """The scores in a response. Their values are checked later, one by one."""
    try:
        scores = parse_json(raw)["scores"]
    except (ValueError, KeyError, TypeError):
        scores = None
    if not isinstance(scores, list) or len(scores) != len(cases):
        raise RewardError(
            f'{url} answered {raw[:200]!r}; wanted {{"scores": [...]}} with {len(cases)} numbers, '
            f"for {cases[0]} and what follows"
        )
    return scores


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpReward(RewardSpec):
    """A server; see `http_reward`.

    Attributes:
      url: http or https.
      timeout: seconds per request.
      max_failures: consecutive failures of a request that stop the run.
      backoff: seconds of the longest first pause between attempts.
      batch: answers per request.
      concurrency: simultaneous requests.
      seed: seed of the pauses' jitter.
      key_variable: environment variable that holds a bearer token; None: none is sent.
    """

    kind: str = "http"
    url: str
    timeout: float = 30.0
    max_failures: int = 5
    backoff: float = 1.0
    batch: int = 16
    concurrency: int = 4
    seed: int = 0
    key_variable: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_http(
            self.url, self.timeout, self.max_failures, self.backoff, self.batch, self.concurrency
        )

    def build(self, context: BuildContext) -> RewardFunction:
        """`http_reward` with these options."""
        return http_reward(
            self.url,
            context.tok,
            rows=context.rows,
            name=context.name,
            timeout=self.timeout,
            max_failures=self.max_failures,
            backoff=self.backoff,
            batch=self.batch,
            concurrency=self.concurrency,
            seed=self.seed,
            key_variable=self.key_variable,
        )
