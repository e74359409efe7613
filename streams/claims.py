"""Fetches images that a record only points at, from places that are allowed and nowhere else.

`https://`, `http://`, `s3://` and `file://`. A URL must begin with an allowed prefix and name a path below it without
tricks (`..`, user info, encoded slashes); redirects are not followed; no more than `max_bytes` are read.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ssl
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from streams.record import Reason, Unusable

ATTEMPTS = 3
"""Times that an image is asked for. Chosen by hand: with waits of 0.5 and 2 s a server's short trouble costs nothing,
and a server that stays away holds up each record for three time-outs at most."""

_BACKOFF_S = 0.5
"""Seconds before the second attempt; before the third there are four times as many. Chosen by hand."""


@dataclass(frozen=True)
class S3:
    """Where `s3://bucket/key` is found and who asks for it; without keys the request is anonymous."""

    endpoint: str = "https://s3.amazonaws.com"
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: str = field(default="", repr=False)


class ImageStore:
    """Gets the bytes behind a URL. It may be used from several threads."""

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

        `timeout_s`: seconds that one attempt may take. `cafile`: certificates to trust instead of the system's.
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

        Raises Unusable: FETCH_FORBIDDEN (not allowed), FETCH_FAILED, TOO_LARGE.
        """
        parts = self._permitted(url)
        if parts.scheme == "file":
            return self._read(parts)
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(_BACKOFF_S * 4 ** (attempt - 1))
            try:
                return self._get(parts, url)
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}"
        raise Unusable(Reason.FETCH_FAILED, f"{url[:500]!r} failed {ATTEMPTS} times, last with {failure[:500]}")

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
        steps = urllib.parse.unquote(parts.path).split("/")
        if "@" in parts.netloc or ".." in steps or "." in steps or "%2f" in parts.path.lower() or "\0" in steps[-1]:
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
        except (OSError, ValueError) as error:
            raise Unusable(Reason.FETCH_FAILED, f"{url[:500]!r}: {error}") from None

    def _get(self, parts: urllib.parse.SplitResult, url: str) -> bytes:
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
        # The client's time-out is for each read alone: a server that sends a byte a second would never meet it.
        deadline = time.monotonic() + self._timeout_s
        try:
            connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
            response = connection.getresponse()
            if response.status >= 500 or response.status == 429:  # worth another attempt
                raise http.client.HTTPException(f"status {response.status}")
            if response.status != 200:
                # A redirect would lead past the check of the prefixes.
                why = "redirects are not followed" if 300 <= response.status < 400 else response.reason
                raise Unusable(Reason.FETCH_FAILED, f"{url[:500]!r} answered {response.status} ({why})")
            chunks: list[bytes] = []
            read = 0
            while read <= self._max_bytes and (chunk := response.read1(2**16)):
                chunks.append(chunk)
                read += len(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{read} bytes in {self._timeout_s} s")
            if response.length and read <= self._max_bytes:  # the connection closed early, which `read1` does not say
                raise http.client.IncompleteRead(b"", response.length)
            return self._bounded(b"".join(chunks), url)
        finally:
            connection.close()

    def _bounded(self, data: bytes, url: str) -> bytes:
        if len(data) > self._max_bytes:
            raise Unusable(Reason.TOO_LARGE, f"{url[:500]!r} has more than {self._max_bytes} bytes")
        return data


def check_prefix(prefix: str) -> str:
    """`prefix`, when it can be allowed: it must name a place, and end where a name ends. Raises ValueError."""
    parts = urllib.parse.urlsplit(prefix)
    where = parts.path if parts.scheme == "file" else parts.netloc
    if parts.scheme not in ("https", "http", "s3", "file") or not where or not prefix.endswith("/"):
        raise ValueError(f"got {prefix!r}, expected https://host/, http://host/, s3://bucket/ or file:///folder/")
    return prefix


def signed(parts: urllib.parse.SplitResult, s3: S3, now: datetime) -> dict[str, str]:
    """The headers of a GET request, signed with AWS Signature Version 4."""
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
