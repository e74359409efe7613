"""The agent's /metrics, /livez, /readyz and status page, on a daemon thread; nothing here can stop the agent's loop."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

log = logging.getLogger(__name__)

JSON = "application/json; charset=utf-8"
"""Content type of every answer in JSON. The encoding is said because names of classes and topics are in any script."""

FRESH_S = 0.5
"""Seconds within which scrapes get the same text: making it takes milliseconds from whatever learns on the same cores.
Prometheus scrapes every few seconds, so only the second of several scrapers sees a value that is half a second old."""

_CLIENT_S = 10
"""Seconds after which a connection that says nothing is closed. Chosen by hand; with a longer time, the threads of
clients that went away stay longer."""


class StatusServer:
    """This is the HTTP server of one agent, for GET and HEAD:

    /metrics             Prometheus (or OpenMetrics, when asked for)
    /livez, /healthz     200 when `live()` gives no reasons, else 503; JSON `{"status", "reasons"}`
    /readyz              200 when `ready()` gives no reasons, else 503; likewise
    /status.json         `status()` without its key `report`
    /report.json         that report, null before the first commit
    /pictures.json       `pictures()`: small pictures of the newest rejected records
    /                    the status page, which asks for the three above

    The callables are called from request threads. While it serves, `heartbeat("http", now)` is called about twice a
    second.
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
    ) -> None:
        """Listen from here on; `start` answers. `port`: 0 is any free one. Raises OSError when the address cannot be
        had."""

        def state() -> dict[str, Any]:
            return {key: value for key, value in status().items() if key != "report"}

        page = _page()
        routes: dict[str, Callable[[str], tuple[int, str, bytes]]] = {
            "/": lambda _: (HTTPStatus.OK, "text/html; charset=utf-8", page),
            "/metrics": _MetricsRoute(registry),
            "/livez": lambda _: _health(live()),
            "/healthz": lambda _: _health(live()),
            "/readyz": lambda _: _health(ready()),
            "/status.json": lambda _: (HTTPStatus.OK, JSON, _json(state())),
            "/report.json": lambda _: (HTTPStatus.OK, JSON, _json(status().get("report"))),
            "/pictures.json": lambda _: (HTTPStatus.OK, JSON, _json(pictures())),
        }
        try:
            self._server = _Server((host, port), type("Handler", (_Handler,), {"routes": routes}))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot serve /metrics on {host}:{port} ({error.strerror or error}); set http.host and http.port to a "
                "free address, or http.port to 0 for any free port",
            ) from error
        self._server.heartbeat = heartbeat
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port listened on, also where 0 was asked for."""
        return self._server.server_address[1]

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port. Does nothing harmful when never started."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _MetricsRoute:
    """Answers /metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._newest = "", b"", -math.inf
        """Content type and text of the newest scrape, and when it was made."""

    def __call__(self, accept: str) -> tuple[int, str, bytes]:
        encode, kind = choose_encoder(accept)
        with self._lock:
            known, text, made = self._newest
            if kind != known or time.monotonic() - made > FRESH_S:
                text = encode(self._registry)
                self._newest = kind, text, time.monotonic()
        return HTTPStatus.OK, kind, text


class _Server(ThreadingHTTPServer):
    """This is Python's own server with a thread for every connection: one that is slow holds up no other."""

    daemon_threads = True  # a client that hangs does not keep the process from ending
    heartbeat: Callable[[str, float], None] | None = None

    def service_actions(self) -> None:
        """Run after every turn of socketserver's loop, which waits half a second for a request."""
        if self.heartbeat is not None:
            self.heartbeat("http", time.time())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: else every client that hangs up would print a traceback to standard error."""
        log.debug("request from %s was cut off: %s", client_address, sys.exception())


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection by `routes`: path -> what makes status, content type and body."""

    routes: dict[str, Callable[[str], tuple[int, str, bytes]]]
    timeout = _CLIENT_S
    server_version = "gapstream"
    sys_version = ""  # which Python runs is nobody's business

    def do_GET(self) -> None:
        """Answer GET and HEAD; http.server refuses every other verb with 501."""
        route = self.routes.get(self.path.partition("?")[0])
        if route is None:
            self._answer(HTTPStatus.NOT_FOUND, JSON, _json({"error": "not found", "paths": list(self.routes)}))
            return
        try:
            answer = route(self.headers.get("Accept", ""))
        except Exception:
            log.exception("%s could not be answered; the agent goes on", self.path)
            answer = HTTPStatus.INTERNAL_SERVER_ERROR, JSON, _json({"error": "internal error; see the agent's log"})
        self._answer(*answer)

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")  # all of it is about now
        self.send_header("X-Content-Type-Options", "nosniff")
        # The page shows text and pictures from the stream, which anybody may have written: nothing is fetched for them.
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' data:")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: else every request would be a line on standard error."""
        log.debug(format, *args)


def _page() -> bytes:
    """Build the status page with its style and charts inside: one file, with nothing fetched from elsewhere."""
    assets = resources.files("exporter").joinpath("assets")
    page = assets.joinpath("status.html").read_text(encoding="utf-8")
    for name in ("look.css", "charts.js"):
        page = page.replace(f"/* {name} */", assets.joinpath(name).read_text(encoding="utf-8"))
    return page.encode()


def _health(reasons: list[str]) -> tuple[int, str, bytes]:
    code = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return code, JSON, _json({"status": "failing" if reasons else "ok", "reasons": reasons})


def _json(value: Any) -> bytes:
    """Browsers refuse NaN, which Python would write; a value that has one is a mistake here, not on the page."""
    return json.dumps(value, allow_nan=False, default=str).encode()
