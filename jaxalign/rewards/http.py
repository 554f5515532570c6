"""HTTP requests that a run depends on: one POST, and how long to wait before the next try.

A request ends by its deadline, even where the server drips; an answer is of bounded size; redirects
are refused, so that a key goes to no other host; and a key is blotted out of whatever is told.
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

_AGAIN = (408, 409, 425, 429)
_LONGEST_WAIT = 60.0
_LONGEST_ASKED = 600.0
_MOST_BYTES = 64 * 2**20


class PostError(Exception):
    """A request failed; the message tells how.

    Attributes:
      status: of HTTP; None where there was no answer.
      again: whether another try may end better.
      wait: seconds that the server asks to wait before it; None: it does not say.
    """

    def __init__(self, told: str, status: int | None, again: bool, wait: float | None = None):
        super().__init__(told)
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
    """Sends a body and gives the answer's.

    Args:
      url: http or https.
      body: of the request.
      headers: of the request.
      timeout: seconds for all of it.
      secret: a text that must not appear in any message.

    Raises:
      PostError: no answer in time, one of a status other than 200 to 299, or too long a one.
    """

    def clean(text: str) -> str:
        return text if secret is None else text.replace(secret, "[key]")

    request = urllib.request.Request(url, body, dict(headers), method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    deadline = time.monotonic() + timeout
    try:
        with opener.open(request, timeout=timeout) as response:
            return clean(_read(response, deadline).decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:
            try:
                said = error.read(4096).decode("utf-8", "replace").strip()
            except (OSError, http.client.HTTPException):
                said = ""
            # Blotted out before it is cut, so that no part of a key stays.
            told = f"HTTP {error.code} {clean(f'{error.reason} {said}')[:300]}".strip()
            again = error.code in _AGAIN or error.code >= 500
            wait = _retry_after(error.headers.get("Retry-After"))
            raise PostError(told, error.code, again, wait) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PostError(clean(f"{type(reason).__name__}: {reason}"), None, True) from None


def pauses(first: float, draw: random.Random) -> Iterator[float]:
    """Seconds before each further try: twice as long every time up to a minute, half of it drawn.

    Args:
      first: the longest first pause.
      draw: so that clients that failed together do not come back together.
    """
    longest = min(first, _LONGEST_WAIT)
    while True:
        yield longest * draw.uniform(0.5, 1.0)
        longest = min(2 * longest, _LONGEST_WAIT)


def check_url(url: str, name: str, example: str) -> None:
    """Refuses an address that is not plain http or https. Its text is not repeated in the error.

    Raises:
      ValueError: another scheme, no host, or a user, query or fragment (which may hold a password).
    """
    parts = urllib.parse.urlsplit(url)
    plain = parts.hostname and not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not plain:
        raise ValueError(
            f"{name}: wanted {example} or https://…, without user, query or fragment; correct it"
        )


def _read(response: Any, deadline: float) -> bytes:
    """The whole body, by the deadline: a server that drips must not hold a run for ever."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer did not end in time")
        if size > _MOST_BYTES:
            raise OSError(f"an answer of more than {_MOST_BYTES} bytes")
    if response.length:  # read1 passes over a body that is shorter than was announced
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _retry_after(value: str | None) -> float | None:
    """Seconds that the server asks to wait, given as a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _LONGEST_ASKED) if seconds == seconds else None
