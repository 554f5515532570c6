"""HTTP POST for servers that a run depends on: deadlines, limits, retry delays, secrets.

A request ends by its deadline, even if the server keeps sending a slow response. Responses are
limited in size. Redirects are refused, so that a secret reaches no other host, and secrets are
redacted from messages.
"""

from __future__ import annotations

import email.utils
import http.client
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

_RETRYABLE = (408, 409, 425, 429)
_MAX_PAUSE = 60.0  # seconds
_MAX_RETRY_AFTER = 600.0  # seconds
_MAX_BYTES = 64 * 2**20


class PostError(Exception):
    """A failed request.

    Attributes:
      status: HTTP status; None without a response.
      again: whether to retry: the failure may be temporary.
      wait: seconds to wait before the retry, by the server's Retry-After; None: not given.
    """

    def __init__(self, message: str, status: int | None, again: bool, wait: float | None = None):
        super().__init__(message)
        self.status = status
        self.again = again
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> None:
        return None


def post(
    url: str, body: bytes, headers: Mapping[str, str], timeout: float, secret: str | None = None
) -> str:
    """Sends a request and returns the body of the response.

    Args:
      url: http or https.
      body: of the request.
      headers: of the request.
      timeout: seconds for the whole request and response.
      secret: redacted from the response and from messages.

    Raises:
      PostError: no response in time, a status other than 200 to 299, or a response over 64 MiB.
    """

    def redact(text: str) -> str:
        return text if secret is None else text.replace(secret, "[key]")

    request = urllib.request.Request(url, body, dict(headers), method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    deadline = time.monotonic() + timeout
    try:
        with opener.open(request, timeout=timeout) as response:
            return redact(_read(response, deadline).decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:
            try:
                detail = error.read(4096).decode("utf-8", "replace").strip()
            except (OSError, http.client.HTTPException):
                detail = ""
            # Redacted before it is truncated: no prefix of a secret may remain.
            message = f"HTTP {error.code} {redact(f'{error.reason} {detail}')[:300]}".strip()
            again = error.code in _RETRYABLE or error.code >= 500
            wait = _retry_after(error.headers.get("Retry-After"))
            raise PostError(message, error.code, again, wait) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PostError(redact(f"{type(reason).__name__}: {reason}"), None, True) from None


def pauses(first: float, rng: random.Random) -> Iterator[float]:
    """Exponential backoff with jitter: seconds to wait before each retry.

    Retry n waits `min(first · 2ⁿ, 60) · U(½, 1)` seconds, n from 0.

    Args:
      first: the longest first pause, seconds.
      rng: source of the jitter, which keeps clients that failed together from retrying together.
    """
    longest = min(first, _MAX_PAUSE)
    while True:
        yield longest * rng.uniform(0.5, 1.0)
        longest = min(2 * longest, _MAX_PAUSE)


def check_url(url: str, name: str, example: str) -> None:
    """Checks that a URL is plain http or https. The error does not repeat it: it may hold a secret.

    Raises:
      ValueError: another scheme, no host, or a user, query or fragment.
    """
    parts = urllib.parse.urlsplit(url)
    plain = parts.hostname and not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not plain:
        raise ValueError(
            f"{name}: wanted {example} or https://…, without user, query or fragment; correct it"
        )


def _read(response: Any, deadline: float) -> bytes:
    """Reads the body by the deadline: socket timeouts alone never end a slow, steady response."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer did not end in time")
        if size > _MAX_BYTES:
            raise OSError(f"an answer of more than {_MAX_BYTES} bytes")
    if response.length:  # read1 does not report a body shorter than Content-Length
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _retry_after(value: str | None) -> float | None:
    """Retry-After in seconds, from a number or a date; None if absent or unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER) if seconds == seconds else None
