"""Scores from a server, over HTTP.

One request holds some answers of a batch, as JSON, and is answered in the same order:

    POST {"prompts": [text, …], "completions": [text, …], "rows": [{column: value, …}, …]}
    200  {"scores": [number or null, …]}

`rows` are the rows of data (`{}` each, where there are none); null says that the reward does not
apply. A request that fails in a way that may pass (no connection, no answer in time, status 408,
409, 425, 429 or 5xx) is sent again after a pause. One that has failed `max_failures` times in a row
stops the run, and so does an answer of another status, or one that does not hold a score for each
completion: no failure is ever a score.
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

from jaxalign.rewards.cases import Case, RewardError
from jaxalign.rewards.http import PostError, check_url, pauses, post
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
    """A reward that a server gives; this module tells what is sent.

    Args:
      url: http or https.
      tok: the policy's tokenizer.
      rows: see `jaxalign.rewards.text_reward`.
      name: how the reward is called in errors.
      timeout: seconds for a request.
      max_failures: failures of a request, one after the other, that stop the run; 1: no second try.
      backoff: seconds of the longest first pause; later ones are twice as long each, up to 60.
      batch: answers in a request.
      concurrency: requests at a time.
      seed: of the pauses, half of which is drawn.
      key_variable: environment variable with a key, sent as `Authorization: Bearer`; None: no key.

    Raises:
      ValueError: an address that is not http or https, numbers out of range, or no key where one
        is named.
    """
    check_http(url, timeout, max_failures, backoff, batch, concurrency)
    key = None if key_variable is None else os.environ.get(key_variable, "").strip()
    if key is not None and not (key and all("!" <= letter <= "~" for letter in key)):
        raise ValueError(f"{key_variable}: wanted a key of printable ASCII without spaces; set it")
    headers = {"Content-Type": "application/json", "User-Agent": "jaxalign"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"

    def ask(cases: Sequence[Case], number: int, stop: threading.Event) -> list[Any]:
        body = _body(cases)
        waits = pauses(backoff, random.Random(f"{seed} {number}"))
        for failures in range(1, max_failures + 1):
            if stop.is_set():
                break  # another request failed for good: its error is the one that is raised
            try:
                return _scores(post(url, body, headers, timeout, key), cases, url)
            except PostError as error:
                if not error.again or failures == max_failures:
                    stop.set()
                    raise RewardError(
                        f"{url} failed {failures} times in a row, the last with {error}; "
                        f"{len(cases)} answers have no score, the first of them {cases[0]}"
                    ) from None
                stop.wait(max(next(waits), error.wait or 0.0))
        return []

    def judge(cases: Sequence[Case]) -> list[float | None]:
        stop = threading.Event()
        parts = [cases[i : i + batch] for i in range(0, len(cases), batch)]
        with concurrent.futures.ThreadPoolExecutor(concurrency) as threads:
            asked = [threads.submit(ask, part, n, stop) for n, part in enumerate(parts)]
            try:
                for each in concurrent.futures.as_completed(asked):
                    each.result()
            finally:
                stop.set()
                for each in asked:
                    each.cancel()
        return [score for each in asked for score in each.result()]

    return TextReward(judge, tok, rows, name)


def check_http(
    url: str, timeout: float, max_failures: int, backoff: float, batch: int, concurrency: int
) -> None:
    """Refuses options of `http_reward` that are out of range."""
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
    """The request, in which every row can be written as JSON."""
    for case in cases:
        try:
            json.dumps(case.row, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RewardError(f"{case} cannot be sent as JSON: {error}") from None
    sent = {
        "prompts": [case.prompt for case in cases],
        "completions": [case.completion for case in cases],
        "rows": [{} if case.row is None else case.row for case in cases],
    }
    return json.dumps(sent).encode()


def _scores(raw: str, cases: Sequence[Case], url: str) -> list[Any]:
    """The answer's scores; numbers are looked at later, one by one."""
    try:
        scores = json.loads(raw)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
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
      seed: of the pauses' jitter.
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
