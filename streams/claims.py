"""Fetches images that a record only points at, from places that are allowed and nowhere else.

`https://`, `http://`, `s3://` and `file://`. A URL must begin with an allowed prefix and name a path below it without
tricks (`..`, user info, encoded slashes); redirects are not followed; no more than `max_bytes` are read.

An image that is not there is rejected. A store that does not answer says nothing of its images: `Unreachable`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import http.client
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from streams.background import in_background
from streams.record import Reason, Unreachable, Unusable

ATTEMPTS = 3
"""Times that an image is asked for. Chosen by hand: with waits of 0.5 and 2 s a server's short trouble costs nothing.
Then the store is asked for the allowed prefix, so that `fetch` takes four time-outs at most."""

_BACKOFF_S = 0.5
"""Seconds before the second attempt; before the third there are four times as many. Chosen by hand."""


_ENCODED_LEVELS = 4
"""Times that a path may be percent-encoded over itself. Names have one level; proxies that decode twice are known."""

_OVERLOADED = (408, 429)
"""Statuses below 500 that say nothing of the image: the server gave up waiting, or is asked too much."""

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of a disk that say something of one file; any other, as of a network disk that is away, is not about it."""


@dataclass(frozen=True)
class S3:
    """Where `s3://bucket/key` is found and who asks for it; without keys the request is anonymous."""

    endpoint: str = "https://s3.amazonaws.com"
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: str = field(default="", repr=False)


class ImageStore:
    """It gets the bytes behind a URL. It may be used from several threads."""

    def __init__(
        self,
        allowed: Sequence[str],
        max_bytes: int,
        timeout_s: float = 10,
        s3: S3 | None = None,
        cafile: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`allowed`: prefixes, each with a scheme and ending in `/`; anything else raises ValueError.

        `timeout_s`: seconds that one attempt may take from end to end. `cafile`: certificates to trust instead of the
        system's.
        """
        for prefix in allowed:
            check_prefix(prefix)
        self._allowed = tuple(allowed)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._s3 = s3 or S3()
        self._tls = ssl.create_default_context(cafile=cafile)
        self._sleep = sleep

    def fetch(self, url: str) -> bytes:
        """Get the bytes behind `url`, at most `max_bytes`; it is tried again when the other side is in trouble.

        Raises Unusable: FETCH_FORBIDDEN (not allowed), FETCH_FAILED, TOO_LARGE; and Unreachable when the store answers
        neither for the image nor for the allowed prefix.
        """
        parts = self._permitted(url)
        if parts.scheme == "file":
            return self._read(parts)
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(_BACKOFF_S * 4 ** (attempt - 1))
            try:
                return self._get(parts, url, self._max_bytes)
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}"
        failed = f"{url[:300]!r} failed {ATTEMPTS} times, last with {failure[:300]}"
        # One image that its server fails on must not hold up the stream; a server that is away must not empty it into
        # the dead letters. Which of the two it is, another question to the same server tells.
        if (trouble := self._trouble(url)) is not None:
            raise Unreachable(f"{failed}; its store does not answer at all ({trouble[:300]})")
        raise Unusable(Reason.FETCH_FAILED, failed)

    def _trouble(self, url: str) -> str | None:
        """Tell why the store behind the prefix of `url` does not answer; None when it does, whatever it says."""
        prefix = next(prefix for prefix in self._allowed if url.startswith(prefix))
        try:
            self._get(urllib.parse.urlsplit(prefix), prefix, 0)
        except Unusable:
            return None
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _permitted(self, url: str) -> urllib.parse.SplitResult:
        # The URL comes from whoever may write to the topic. A prefix alone is not enough: what reads the URL later may
        # resolve `..`, take the host from behind an `@`, or decode a slash that was no slash here.
        forbidden = Unusable(Reason.FETCH_FORBIDDEN, f"{url[:500]!r} is not below an allowed prefix")
        if not url.startswith(self._allowed) or not url.isascii() or any(c <= " " or c in '\\"#\x7f' for c in url):
            raise forbidden
        try:
            parts = urllib.parse.urlsplit(url)
            _ = parts.port  # raises for a port that is no number
        except ValueError:
            raise forbidden from None
        if "@" in parts.netloc or not _is_plain(parts.path):
            raise forbidden
        return parts

    def _read(self, parts: urllib.parse.SplitResult) -> bytes:
        url = parts.geturl()
        folders = [urllib.parse.urlsplit(prefix).path for prefix in self._allowed if prefix.startswith("file:")]
        try:
            # Resolved, as a link below an allowed folder may lead anywhere.
            path = Path(urllib.parse.unquote(parts.path)).resolve(strict=True)
            if not any(path.is_relative_to(Path(urllib.parse.unquote(folder)).resolve()) for folder in folders):
                raise Unusable(Reason.FETCH_FORBIDDEN, f"{url[:500]!r} is a link that leads out of the allowed folder")
            if not path.is_file():
                raise Unusable(Reason.FETCH_FAILED, f"{url[:500]!r} is not a file")
            with path.open("rb") as file:
                return self._bounded(file.read(self._max_bytes + 1), url)
        except ValueError as error:
            raise Unusable(Reason.FETCH_FAILED, f"{url[:500]!r}: {error}") from None
        except OSError as error:
            there = any(Path(urllib.parse.unquote(folder)).is_dir() for folder in folders if url[7:].startswith(folder))
            if error.errno not in _GONE or not there:  # as of a disk that is not mounted
                raise Unreachable(f"{url[:300]!r}: {error}") from None
            raise Unusable(Reason.FETCH_FAILED, f"{url[:500]!r}: {error}") from None

    def _get(self, parts: urllib.parse.SplitResult, url: str, most: int) -> bytes:
        """Give the answer to one request, at most `most` bytes of it, within `timeout_s` from end to end.

        Raises Unusable for what the server says of the image, OSError and HTTPException for trouble with the server.
        """
        headers: dict[str, str] = {}
        if parts.scheme == "s3":
            endpoint = urllib.parse.urlsplit(self._s3.endpoint)
            # The bucket as part of the path: not every service of this kind has a host name for every bucket.
            parts = endpoint._replace(path=f"/{parts.netloc}{parts.path}")
            headers = signed(parts, self._s3, datetime.now(UTC)) if self._s3.access_key else {}
        host, port = parts.hostname or "", parts.port
        connection = (
            http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            if parts.scheme == "http"
            else http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)
        )
        # The client's time-out is for each read alone, and none is for the host's name: a server that sends its headers
        # byte by byte made 142 s of 2. So the whole is waited for, and then its socket is shut under it.
        answer = in_background(lambda: self._answer(connection, parts, headers, url, most), "image-request")
        try:
            return answer.result(self._timeout_s)
        except TimeoutError:
            if answer.done():  # it timed out by itself
                raise
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            raise TimeoutError(f"no whole answer in {self._timeout_s} s") from None

    def _answer(
        self,
        connection: http.client.HTTPConnection,
        parts: urllib.parse.SplitResult,
        headers: dict[str, str],
        url: str,
        most: int,
    ) -> bytes:
        """Ask and read; it may take for ever, and `_get` waits no longer than it may."""
        try:
            connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
            response = connection.getresponse()
            if response.status >= 500 or response.status in _OVERLOADED:  # worth another attempt
                raise http.client.HTTPException(f"status {response.status}")
            if response.status != 200:
                # A redirect would lead past the check of the prefixes.
                why = "redirects are not followed" if 300 <= response.status < 400 else response.reason
                raise Unusable(Reason.FETCH_FAILED, f"{url[:500]!r} answered {response.status} ({why})")
            chunks: list[bytes] = []
            read = 0
            while read <= most and (chunk := response.read1(2**16)):
                chunks.append(chunk)
                read += len(chunk)
            if response.length and read <= most:  # the connection closed early, which `read1` does not say
                raise http.client.IncompleteRead(b"", response.length)
            if read > most:
                raise Unusable(Reason.TOO_LARGE, f"{url[:500]!r} has more than {most} bytes")
            return b"".join(chunks)
        finally:
            connection.close()

    def _bounded(self, data: bytes, url: str) -> bytes:
        if len(data) > self._max_bytes:
            raise Unusable(Reason.TOO_LARGE, f"{url[:500]!r} has more than {self._max_bytes} bytes")
        return data


def _is_plain(path: str) -> bool:
    """Tell whether a path only leads down, also for a server that decodes it more than once or drops what follows a
    `;`.
    """
    for _ in range(_ENCODED_LEVELS):
        steps = {step.partition(";")[0].strip() for step in path.split("/")}
        if steps & {".", ".."} or "\\" in path or "\0" in path or re.search("%(2f|5c)", path, re.IGNORECASE):
            return False
        decoded = urllib.parse.unquote(path)
        if decoded == path:
            return True
        path = decoded
    return False


def check_prefix(prefix: str) -> None:
    """Raise ValueError unless `prefix` can be allowed: it must name a place, and end where a name ends."""
    parts = urllib.parse.urlsplit(prefix)
    where = parts.path if parts.scheme == "file" else parts.netloc
    if parts.scheme not in ("https", "http", "s3", "file") or not where or not prefix.endswith("/"):
        raise ValueError(f"got {prefix!r}, expected https://host/, http://host/, s3://bucket/ or file:///folder/")


def signed(parts: urllib.parse.SplitResult, s3: S3, now: datetime) -> dict[str, str]:
    """Give the headers of a GET request, signed with AWS Signature Version 4."""
    date, stamp = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": parts.netloc, "x-amz-content-sha256": empty, "x-amz-date": stamp}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = f"GET\n{parts.path}\n{parts.query}\n{lines}\n{names}\n{empty}"
    scope = f"{date}/{s3.region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{s3.secret_key}".encode()
    for step in (date, s3.region, "s3", "aws4_request"):
        key = hmac.digest(key, step.encode(), "sha256")
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    credential = f"Credential={s3.access_key}/{scope}"
    return headers | {"authorization": f"AWS4-HMAC-SHA256 {credential},SignedHeaders={names},Signature={signature}"}
