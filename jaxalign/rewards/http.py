"""HTTP POST for servers that a run depends on: deadlines, limits, retry delays, secrets.

A request ends by its deadline, whatever the server does: it may send a header or an error's body
one byte at a time. Responses are limited in size. Redirects are not followed, so that a secret
reaches no other host, and secrets are redacted from messages.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import random
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_RETRYABLE = (408, 409, 425, 429)
_MAX_PAUSE = 60.0  # seconds
_MAX_RETRY_AFTER = 600.0  # seconds
_SAID = 30.0  # seconds; longer pauses are printed
_MAX_BYTES = 64 * 2**20


class PostError(Exception):
    """A failed request.

    Attributes:
      status: HTTP status; None without a response.
      again: whether to retry, because the failure may be temporary.
      wait: seconds to wait before the retry, from the server's Retry-After, at most 600; None: not
        given.
    """

    def __init__(self, message: str, status: int | None, again: bool, wait: float | None = None):
        super().__init__(message)
        self.status = status
        self.again = again
        self.wait = wait


class _Exchange:
    """Sends one request in a thread, and drops the connection at the deadline.

    Socket timeouts are not enough: they apply to a single read, so a server that sends a byte now
    and then never reaches them.
    """

    def __init__(self, send: Callable[[Callable[[Any], None]], str]):
        self._send = send
        self._lock = threading.Lock()
        self._over = False
        self._sockets: list[socket.socket] = []
        self._text = ""
        self._error: BaseException | None = None
        # A daemon thread: one that hangs in a DNS look-up does not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="jaxalign-post", daemon=True)

    def result(self, timeout: float) -> str:
        """Returns the response or raises the request's error; TimeoutError after `timeout` s."""
        self._thread.start()
        self._thread.join(timeout)
        with self._lock:
            self._over = self._thread.is_alive()
            if self._over:
                for each in self._sockets:
                    _drop(each)
        if self._over:
            raise TimeoutError(f"the answer did not end in time, within {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._text

    def _run(self) -> None:
        try:
            self._text = self._send(self._opened)
        except BaseException as error:  # raised in the waiting thread
            self._error = error

    def _opened(self, connected: socket.socket) -> None:
        with self._lock:
            self._sockets.append(connected)
            if self._over:
                _drop(connected)


def _drop(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _noting(connection: Any, opened: Callable[[Any], None]) -> Any:
    """A connection class that passes its socket to `opened` once it is open."""

    class Noting(connection):
        def connect(self) -> None:
            super().connect()
            opened(self.sock)

    return Noting


class _Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, opened: Callable[[Any], None]):
        super().__init__()
        self._opened = opened

    def http_open(self, req: Any) -> Any:
        return self.do_open(_noting(http.client.HTTPConnection, self._opened), req)

    def https_open(self, req: Any) -> Any:
        return self.do_open(_noting(http.client.HTTPSConnection, self._opened), req)


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
      body: the request's body.
      headers: the request's headers.
      timeout: seconds for the whole exchange, from the DNS look-up to the last byte.
      secret: redacted from the response and from messages.

    Raises:
      PostError: no response in time, a status other than 200 to 299, or a response over 64 MiB.
    """

    def redact(text: str) -> str:
        return text if secret is None else text.replace(secret, "[key]")

    request = urllib.request.Request(url, body, dict(headers), method="POST")

    def send(opened: Callable[[Any], None]) -> str:
        opener = urllib.request.build_opener(_NoRedirect, _Connections(opened))
        return _send(opener, request, timeout, redact)

    try:
        return _Exchange(send).result(timeout)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PostError(redact(f"{type(reason).__name__}: {reason}"), None, True) from None


def _send(
    opener: urllib.request.OpenerDirector,
    request: urllib.request.Request,
    timeout: float,
    redact: Callable[[str], str],
) -> str:
    try:
        with opener.open(request, timeout=timeout) as response:
            return redact(_read(response).decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:
            try:
                detail = error.read(4096).decode("utf-8", "replace").strip()
            except (OSError, http.client.HTTPException):
                detail = ""
            # Redact before truncating, so that no prefix of a secret remains.
            message = f"HTTP {error.code} {redact(f'{error.reason} {detail}')[:300]}".strip()
            again = error.code in _RETRYABLE or error.code >= 500
            wait = _retry_after(error.headers.get("Retry-After"))
            raise PostError(message, error.code, again, wait) from None


def pauses(first: float, rng: random.Random) -> Iterator[float]:
    """Exponential backoff with jitter: seconds to wait before each retry.

    Retry n, counted from 0, waits `min(first · 2ⁿ, 60) · U(½, 1)` seconds.

    Args:
      first: the longest first pause, seconds.
      rng: source of the jitter, which stops clients that failed together from retrying together.
    """
    longest = min(first, _MAX_PAUSE)
    while True:
        yield longest * rng.uniform(0.5, 1.0)
        longest = min(2 * longest, _MAX_PAUSE)


def check_url(url: str, name: str, example: str) -> None:
    """Checks that a URL is plain http or https. The error does not quote it: it may hold a secret.

    Raises:
      ValueError: another scheme, no host, or a user, query or fragment.
    """
    parts = urllib.parse.urlsplit(url)
    plain = parts.hostname and not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not plain:
        raise ValueError(
            f"{name}: wanted {example} or https://…, without user, query or fragment; correct it"
        )


def say_pause(url: str, error: Exception, pause: float) -> None:
    """Prints that a retry waits for a server, unless the pause is short."""
    if pause >= _SAID:
        print(f"{url}: {error}; the next try is in {pause:.0f} s", flush=True)


def _read(response: Any) -> bytes:
    """Reads the body."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
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
