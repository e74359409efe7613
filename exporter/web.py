"""What both HTTP servers have in common: connections bounded in number and time, and the names they answer to."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10
"""Seconds within which the head of a request must be there, counted from the connection or from the end of the answer
before, however often bytes come. Chosen by hand: a head is one packet; with more, who never ends it stays longer."""

BODY_S = 30
"""Seconds within which a request's body must be there, and an answer be taken. Chosen by hand: the largest request by
default (32 MiB) at 10 Mbit/s."""

BACKLOG = 128
"""Connections that the kernel keeps until they are accepted. All of them may be accepted at one go before the first is
closed for being too many, so this and a server's limit together stay below the 1,024 files that a process may open
where nobody raised that."""

_LOOK_S = 1.0
"""Seconds between two looks at a connection's deadline, which is exact to that; more often costs more."""

_READ_BYTES = 64 * 2**10
"""Bytes of one connection that are read before the others have their turn: as many as uvicorn keeps of a body that
nobody takes. asyncio's own 256 KiB let one client keep all others waiting four times as long."""

_LINE_BYTES = 64
"""Mean length, in bytes, below which lines are not taken: chunks of a body with hardly anything in them, and requests
that do not wait for answers. Each costs some 10 us of the event loop whatever is in it: chunks of one byte kept probes
waiting for 2.5 s, and clients that know what they do send kilobytes."""

_FREE_BYTES = 16 * 2**10
"""Bytes that one read may have less than that, for heads of short lines: 256 of them."""

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:@/\\\[\]]+))(?::\d*)?", re.ASCII | re.IGNORECASE)
"""A Host header: an IPv6 address in brackets, or a name or IPv4 address, and then perhaps a port."""


def listen(host: str, port: int, section: str) -> socket.socket:
    """Listen on `host` and `port` (0: any free one). Raises OSError that names the keys of `section` to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot serve on {host}:{port} ({error.strerror or error}); set {section}.host and {section}.port to a "
            f"free address, or {section}.port to 0 for any free port",
        ) from error
    # asyncio sets it only on sockets made with IPPROTO_TCP; without it an answer waits 40 ms for the client's ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def web_server(
    routes: Sequence[Route],
    *,
    host: str,
    allowed_hosts: Sequence[str],
    max_connections: int,
    drain_s: int,
    not_found: Callable[[Request, Exception], Awaitable[Response]] | None = None,
) -> uvicorn.Server:
    """Make a server of `routes`, to be run on a socket of `listen`.

    It answers to `host`, `allowed_hosts` and what AllowedHosts always allows, holds at most `max_connections`, and has
    `drain_s` seconds for what has begun when it is stopped. `not_found` answers other paths.
    """
    names = (host, socket.gethostname(), *allowed_hosts)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(AllowedHosts, names=names)],
        exception_handlers={404: not_found} if not_found else None,
    )
    app.router.redirect_slashes = False  # the redirect would repeat the Host header that a client sent
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], type("Connection", (Connection,), {"limit": max_connections})),
            ws="none",
            backlog=BACKLOG,
            log_config=None,  # or uvicorn would set up logging anew
            log_level="warning",  # who runs the server says that it begins and ends
            access_log=False,  # nothing is logged per request: /metrics counts them
            server_header=False,
            proxy_headers=False,  # who asks is never looked at, so nobody's word is needed for it
            lifespan="off",  # Starlette has nothing to set up; whoever runs the server closes what is open
            timeout_graceful_shutdown=drain_s,
        )
    )


def health(reasons: Sequence[str], headers: Mapping[str, str] | None = None, warnings: Sequence[str] = ()) -> Response:
    """Answer a probe: 200 when there are no `reasons`, else 503. `warnings` are told and change nothing."""
    body = {"status": "failing" if reasons else "ok", "reasons": list(reasons)}
    body |= {"warnings": list(warnings)} if warnings else {}
    return JSONResponse(body, 503 if reasons else 200, headers)


class AllowedHosts:
    """Refuses (403) requests whose Host header is none of `names`.

    A page of a foreign site whose name is made to point at this machine (DNS rebinding) is thereby kept from reading
    answers: its browser sends that site's name. So addresses are always allowed, for no name is rebound there, as are
    `localhost` and names below it. A request without the header (HTTP/1.0) comes from no browser and is allowed too.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        """`names`: without port, in any case; `*` allows every name."""
        self._app = app
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        host = Headers(scope=scope).get("host")
        if host is None or self._allows(host):
            await self._app(scope, receive, send)
            return
        told = f"got the Host header {host[:100]!r}, expected an address or a name in allowed_hosts of the server"
        await JSONResponse({"error": told}, 403, {"Connection": "close"})(scope, receive, send)

    def _allows(self, host: str) -> bool:
        if "*" in self._names:
            return True
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().removesuffix(".")
        if name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Connection(H11Protocol):
    """A connection that ends when its client lets a deadline pass, or keeps it waiting longest when there are too many.

    A client that sends a byte now and then keeps no connection open: what counts is a whole request.
    """

    limit: int
    """Connections that one server holds."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch; with one connection too many, another makes room."""
        super().connection_made(transport)
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._turn: tuple[object, str] = (None, "head")
        self._since = self.loop.time()
        self._timer = self.loop.call_later(_LOOK_S, self._look)
        if len(self.connections) > self.limit:
            waiting = [one for one in cast(set[Connection], self.connections) if one.doing() != "answer"]
            # The newest, which may be a probe, goes only where all others are being answered.
            oldest = min(waiting, key=lambda one: one.waiting_since(), default=self)
            oldest.give_up()

    def data_received(self, data: bytes) -> None:
        """Take bytes, unless they are hardly more than the ends of lines that have to be parsed."""
        while data and not self.transport.is_closing():
            part, rest = data, b""
            if self.conn.their_state is h11.IDLE:  # the body may begin in the same packet, under its own rule
                head, end, rest = data.partition(b"\r\n\r\n")
                part = head + end
            parsed = not (self.conn.their_state is h11.SEND_BODY and self._announced())
            if parsed and part.count(b"\r\n") * _LINE_BYTES > len(part) + _FREE_BYTES:
                self.give_up()
                return
            super().data_received(part)
            data = rest

    def _announced(self) -> bool:
        """Tell whether the body that is being read has a length, and no chunks."""
        return any(name == b"content-length" for name, _ in self.headers)

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch no more."""
        self._timer.cancel()
        super().connection_lost(exc)

    def give_up(self) -> None:
        """End the connection at once, whatever is under way."""
        self.connections.discard(self)  # now, not when asyncio is done with it: the next one counts those that are left
        self.transport.abort()

    def doing(self) -> str:
        """Tell what is under way: `answer` is our turn, and the client's are `head`, `body` and `take` (an answer)."""
        if self.cycle is not None and not self.cycle.response_complete:
            return "body" if self.conn.their_state is h11.SEND_BODY else "answer"
        return "take" if self.transport.get_write_buffer_size() else "head"

    def waiting_since(self) -> float:
        """Give the time, by the event loop's clock, when what is under way was first seen."""
        turn = (self.cycle, self.doing())
        if turn != self._turn:
            self._turn, self._since = turn, self.loop.time()
        return self._since

    def _look(self) -> None:
        waited = self.loop.time() - self.waiting_since()
        # A body has its deadline where it is read, which can say so to the client; here is the last resort.
        allowed = {"head": HEAD_S, "body": BODY_S + HEAD_S, "take": BODY_S, "answer": float("inf")}
        if waited > allowed[self.doing()]:
            self.give_up()
        else:
            self._timer = self.loop.call_later(_LOOK_S, self._look)
