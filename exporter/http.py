"""The agent's /metrics, /livez, /readyz and status page, on a daemon thread; nothing here can stop the agent's loop."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from importlib import resources
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from exporter.web import health, listen, web_server

log = logging.getLogger(__name__)

JSON = "application/json; charset=utf-8"
"""Content type of every answer in JSON. The encoding is said because names of classes and topics are in any script."""

FRESH_S = 0.5
"""Seconds within which scrapes get the same text: making it takes milliseconds from whatever learns on the same cores.
Prometheus scrapes every few seconds, so only the second of several scrapers sees a value that is half a second old."""

MAX_CONNECTIONS = 128
"""Connections at once; for one more, the idlest is closed. Chosen by hand: a few scrapers, probes and open status pages
need a dozen; more only let who opens them for nothing take more of the agent's memory and files."""

_BEAT_S = 0.5
"""Seconds between two signs of life of the server's loop, well below what is taken for dead (agent.run.STALLED_S)."""

_STOP_S = 2
"""Seconds that answers under way have at the end, and then the thread once more: a page is made in less."""

_HEADERS = {
    "Cache-Control": "no-store",  # all of it is about now
    "X-Content-Type-Options": "nosniff",
    # The page shows text and pictures from the stream, which anybody may have written: nothing is fetched for them.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:",
}

Page = tuple[str, bytes]
"""Content type and body."""


class StatusServer:
    """This is the HTTP server of one agent, for GET and HEAD:

    /metrics             Prometheus (or OpenMetrics, when asked for)
    /livez, /healthz     200 when `live()` gives no reasons, else 503; JSON `{"status", "reasons"}`
    /readyz              200 when `ready()` gives no reasons, else 503; likewise
    /status.json         `status()` without its key `report`
    /report.json         that report, null before the first commit
    /pictures.json       `pictures()`: small pictures of the newest rejected records
    /                    the status page, which asks for the three above

    `live` and `ready` are called from the server's thread and must be quick; the others from threads beside it, each in
    one at a time. While it serves, `heartbeat("http", now)` is called about twice a second.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        live: Callable[[], list[str]],
        ready: Callable[[], list[str]],
        status: Callable[[], dict[str, Any]],
        heartbeat: Callable[[str, float], None] | None = None,
        pictures: Callable[[], dict[int, str | None]] = dict,
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        """Listen from here on; `start` answers. `port`: 0 is any free one. `allowed_hosts`: names that it answers to,
        besides those of exporter.web. Raises OSError when the address cannot be had."""

        def state() -> dict[str, Any]:
            return {key: value for key, value in status().items() if key != "report"}

        page = _page()
        pages: dict[str, Callable[[str], Page]] = {
            "/": lambda _: ("text/html; charset=utf-8", page),
            "/metrics": _Metrics(registry),
            "/status.json": lambda _: (JSON, _json(state())),
            "/report.json": lambda _: (JSON, _json(status().get("report"))),
            "/pictures.json": lambda _: (JSON, _json(pictures())),
        }
        probes = {"/livez": live, "/healthz": live, "/readyz": ready}
        paths = [*pages, *probes]

        async def not_found(request: Request, error: Exception) -> Response:
            return Response(_json({"error": "not found", "paths": paths}), 404, _HEADERS, JSON)

        self._heartbeat = heartbeat
        self._server = web_server(
            [Route(path, _answer(path, make)) for path, make in pages.items()]
            + [Route(path, _probe(reasons)) for path, reasons in probes.items()],
            host=host,
            allowed_hosts=allowed_hosts,
            max_connections=MAX_CONNECTIONS,
            drain_s=_STOP_S,
            not_found=not_found,
        )
        self._socket = listen(host, port, "http")
        self._port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port listened on, also where 0 was asked for."""
        return self._port

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port. Does nothing harmful when never started."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(2 * _STOP_S)
        self._socket.close()

    async def _serve(self) -> None:
        async def beat() -> None:
            while True:
                if self._heartbeat is not None:
                    self._heartbeat("http", time.time())
                await asyncio.sleep(_BEAT_S)

        beating = asyncio.create_task(beat())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            beating.cancel()


def _answer(path: str, make: Callable[[str], Page]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Answer by `make`, which gets the header Accept and may take its time: probes are answered meanwhile."""
    # One at a time: many who ask for what takes seconds must not take all threads, which /metrics needs too.
    one_at_a_time = asyncio.Lock()

    async def answer(request: Request) -> Response:
        try:
            async with one_at_a_time:
                kind, body = await asyncio.to_thread(make, request.headers.get("accept", ""))
            return Response(body, 200, {**_HEADERS, "Content-Type": kind})
        except Exception:
            log.exception("%s could not be answered; the agent goes on", path)
            return Response(_json({"error": "internal error; see the agent's log"}), 500, _HEADERS, JSON)

    return answer


def _probe(reasons: Callable[[], list[str]]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def answer(request: Request) -> Response:
        return health(reasons(), _HEADERS)

    return answer


class _Metrics:
    """Makes the text of /metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._newest = "", b"", -math.inf
        """Content type and text of the newest scrape, and when it was made."""

    def __call__(self, accept: str) -> Page:
        encode, kind = choose_encoder(accept)
        known, text, made = self._newest
        if kind != known or time.monotonic() - made > FRESH_S:
            text = encode(self._registry)
            self._newest = kind, text, time.monotonic()
        return kind, text


def _page() -> bytes:
    """Build the status page with its style and charts inside: one file, with nothing fetched from elsewhere."""
    assets = resources.files("exporter").joinpath("assets")
    page = assets.joinpath("status.html").read_text(encoding="utf-8")
    for name in ("look.css", "charts.js"):
        page = page.replace(f"/* {name} */", assets.joinpath(name).read_text(encoding="utf-8"))
    return page.encode()


def _json(value: Any) -> bytes:
    """Browsers refuse NaN, which Python would write; a value that has one is a mistake here, not on the page."""
    return json.dumps(value, allow_nan=False, default=str).encode()
