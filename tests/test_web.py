"""What both HTTP servers do with connections: deadlines from end to end, a limit, and the names they answer to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from exporter import web
from exporter.web import AllowedHosts, listen, web_server

GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LARGE = 2**24
"""Bytes of an answer that no socket holds."""


@contextmanager
def serving(max_connections: int = 8) -> Iterator[int]:
    """A server of one path, by its port. `/?large` has a large answer, `/?slow` one that takes a while."""

    async def answer(request: Request) -> Response:
        if request.url.query == "slow":
            await asyncio.sleep(1.5)
        if request.method == "POST":
            with contextlib.suppress(ClientDisconnect):
                await request.body()
        return PlainTextResponse("x" * (LARGE if request.url.query == "large" else 1))

    server = web_server(
        [Route("/", answer, methods=["GET", "POST"])],
        host="127.0.0.1",
        allowed_hosts=(),
        max_connections=max_connections,
        drain_s=1,
    )
    listening = listen("127.0.0.1", 0, "test")
    port = listening.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)


def connect(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(sent)
    return client


def ended(client: socket.socket) -> bool:
    """Whether the server ends the connection within twenty seconds; what it says before is read."""
    try:
        while client.recv(2**16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def answered(port: int) -> bool:
    with connect(port, GET) as client:
        return client.recv(2**16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        GET[:-2],
        GET + GET[:-2],
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a head after an answer", "no body", "half a body in chunks", "a body unread"],
)
def test_a_request_that_drips_is_ended_at_its_deadline(sent, monkeypatch):
    monkeypatch.setattr(web, "HEAD_S", 0.3)
    monkeypatch.setattr(web, "BODY_S", 0.3)
    monkeypatch.setattr(web, "_LOOK_S", 0.1)
    with serving() as port, connect(port, sent) as client:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 20:
                client.sendall(b"x")
                time.sleep(0.05)
        assert answered(port)


def chunked(size: int, chunks: int) -> bytes:
    head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + (b"%x\r\n%s\r\n" % (size, b"x" * size)) * chunks + b"0\r\n\r\n"


def test_a_body_in_chunks_of_a_byte_is_not_taken():
    """Two million of them took half a minute of the event loop, and probes waited."""
    with serving() as port, connect(port) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(chunked(1, 300_000))
        assert ended(client)
        assert answered(port)


@pytest.mark.parametrize("head_end", [b"\r\n\r\n", b"\n\n"])
def test_small_chunks_that_come_with_their_head_are_not_taken_either(head_end):
    with serving() as port, connect(port) as client, contextlib.suppress(ConnectionError):
        client.sendall(chunked(1, 5000).replace(b"\r\n\r\n", head_end, 1))
        assert client.recv(2**16) == b""


@pytest.mark.parametrize(("size", "chunks"), [(200, 5000), (1, 20)])
def test_chunks_of_some_size_and_a_few_small_ones_are_taken(size, chunks):
    with serving() as port, connect(port, chunked(size, chunks)) as client:
        assert client.recv(2**16).startswith(b"HTTP/1.1 200")


def test_line_ends_in_a_body_without_chunks_are_taken():
    body = b"\r\n" * 100_000
    head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving() as port, connect(port, head + body) as client:
        assert client.recv(2**16).startswith(b"HTTP/1.1 200")


def test_requests_that_wait_for_no_answer_are_answered_in_their_order_but_not_without_end():
    with serving() as port, connect(port, GET * 20) as client:
        got = b""
        while got.count(b"HTTP/1.1 200") < 20:
            got += client.recv(2**16)
    with serving() as port, connect(port) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(GET * 20_000)
        assert ended(client)
        assert answered(port)


def test_an_answer_that_nobody_takes_is_given_up(monkeypatch):
    given_up = threading.Event()
    give_up = web.Connection.give_up
    monkeypatch.setattr(web, "BODY_S", 0.3)
    monkeypatch.setattr(web, "_LOOK_S", 0.1)
    monkeypatch.setattr(web.Connection, "give_up", lambda connection: (give_up(connection), given_up.set()))
    with serving() as port, connect(port, GET.replace(b"/ ", b"/?large ")) as client:
        assert given_up.wait(20)
        got = 0
        try:
            while data := client.recv(2**16):
                got += len(data)
        except ConnectionError:
            pass
        assert got < LARGE


def test_who_is_slow_but_within_the_deadline_is_answered():
    with serving() as port, connect(port) as client:
        for byte in GET:
            client.sendall(bytes([byte]))
            time.sleep(0.01)
        assert client.recv(2**16).startswith(b"HTTP/1.1 200")


def test_the_connection_that_waited_longest_makes_room_for_another():
    with serving(max_connections=3) as port:
        waiting = []
        for _ in range(3):
            waiting.append(connect(port, GET[:-2]))
            time.sleep(0.05)

        assert answered(port)

        assert ended(waiting[0])
        for client in waiting[1:]:
            client.sendall(GET[-2:])
            assert client.recv(2**16).startswith(b"HTTP/1.1 200")
            client.close()


def test_a_connection_that_is_being_answered_makes_no_room():
    with serving(max_connections=2) as port:
        slow = [connect(port, GET.replace(b"/ ", b"/?slow ")) for _ in range(2)]
        time.sleep(0.3)
        with connect(port) as third:
            assert ended(third)
        for client in slow:
            assert client.recv(2**16).startswith(b"HTTP/1.1 200")
            client.close()


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LocalHost.:9188", True),
        ("gapstream.localhost:9188", True),
        ("127.0.0.1:9187", True),
        ("10.4.3.2", True),  # a kubelet, or Prometheus, by the pod's address
        ("[::1]:9188", True),
        ("[fe80::1]", True),
        ("images.example.com", True),
        ("Images.Example.com.:443", True),
        ("example.com", False),
        ("evil.images.example.com", False),
        ("images.example.com.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("notlocalhost", False),
        ("localhost@evil.example", False),
        ("evil.example@localhost", False),
        ("localhost/evil", False),
        ("[::1", False),
        ("::1", False),
        ("[localhost]", False),
        ("localhost:x", False),
        ("", False),
        (" ", False),
    ],
)
def test_names_are_answered_that_nobody_else_can_make_point_here(host, allowed):
    assert AllowedHosts(lambda *_: None, ["images.example.com"])._allows(host) == allowed
    assert AllowedHosts(lambda *_: None, ["*"])._allows(host)


def test_a_request_without_a_host_is_from_no_browser_and_answered():
    with serving() as port, connect(port, b"GET / HTTP/1.0\r\n\r\n") as client:
        assert client.recv(2**16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "head",
    [b"GET / HTTP/1.1\r\nHost: rebound.example\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n"],
)
def test_a_foreign_or_second_host_is_refused(head):
    with serving() as port, connect(port, head) as client:
        assert client.recv(2**16).startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))
