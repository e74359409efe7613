"""Bodies of requests in memory: read within a time, bounded together, and the slowest gives way."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from exporter.web import BODY_S

_NEWCOMER = 2**20
"""Bytes a second that a body counts as having when it begins. Chosen by hand: with less, who has just begun would give
way to one that stopped a moment ago."""


class Refused(Exception):
    """A request that is not answered; the message says why."""

    def __init__(self, status: int, why: str) -> None:
        """`status`: the HTTP status of the refusal."""
        super().__init__(why)
        self.status = status


class _Upload:
    """A body that is being read."""

    deadline: asyncio.Timeout
    """What ends the reading; set when it begins."""

    def __init__(self, now: float) -> None:
        self.size = 0
        """Bytes of it in memory."""
        self.gave_way = False
        """Whether it was given up for others."""
        self._pace, self._at = float(_NEWCOMER), now

    def grow(self, size: int, now: float) -> None:
        """Note that `size` more bytes are there."""
        self._pace, self._at = self.pace(now) + size, now
        self.size += size

    def pace(self, now: float) -> float:
        """Give about the bytes of the last second."""
        return self._pace * math.exp(self._at - now)


class Bodies:
    """The bodies that a server has in memory, on one event loop."""

    def __init__(self, max_bytes: int, max_total: int) -> None:
        """`max_bytes`: of one body. `max_total`: of all of them, those that are being answered included."""
        self._max_bytes = max_bytes
        self._max_total = max(max_total, max_bytes)
        self._total = 0
        self._unfinished: set[_Upload] = set()

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Give the whole body of a request; it counts until the block ends.

        Raises Refused: 413 for one that is too large, 408 for one that is not there within BODY_S, 400 where the client
        has gone, and 503 where there is no room, and this one comes slowest of all that are still coming.
        """
        upload = _Upload(asyncio.get_running_loop().time())
        try:
            yield await self._read(request, upload)
        finally:
            self._total -= upload.size

    async def _read(self, request: Request, upload: _Upload) -> bytes:
        """What a client announces may be a lie, so both that and what comes are checked."""
        too_large = f"larger than the {self._max_bytes} bytes that are taken; send fewer or smaller images"
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise Refused(413, f"the request has {announced} bytes, {too_large}")
        body = bytearray()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(BODY_S) as upload.deadline:
                self._unfinished.add(upload)
                async for chunk in request.stream():
                    self._make_room(upload, len(chunk), loop.time())
                    body += chunk
                    if len(body) > self._max_bytes:
                        raise Refused(413, f"the request is {too_large}")
        except TimeoutError:
            if upload.gave_way:
                raise _no_room(self._max_total) from None
            raise Refused(408, f"the request was not complete after {BODY_S} s") from None
        except ClientDisconnect:
            raise Refused(400, "the request ended before its body did") from None
        finally:
            self._unfinished.discard(upload)
        return bytes(body)

    def _make_room(self, upload: _Upload, size: int, now: float) -> None:
        if upload.gave_way:  # it is about to be told so
            return
        upload.grow(size, now)
        self._total += size
        while self._total > self._max_total:
            slowest = min(self._unfinished, key=lambda one: one.pace(now))
            self._unfinished.discard(slowest)
            if slowest is upload:
                raise _no_room(self._max_total)
            slowest.gave_way = True
            slowest.deadline.reschedule(now)
            # Its memory is free in the next turn of the loop; nobody else has to give way for it.
            self._total -= slowest.size
            slowest.size = 0


def _no_room(most: int) -> Refused:
    return Refused(503, f"the requests under way have more than {most} bytes, and this one came slowest; come again")
