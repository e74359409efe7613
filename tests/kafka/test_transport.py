"""The client takes what a broker sends in large pieces, and notices the same ends of a connection as before."""

from __future__ import annotations

import ssl
from types import SimpleNamespace
from typing import Any

import pytest
from kafka.errors import KafkaConnectionError
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

from streams.kafka.transport import PIECE_BYTES, take_large_pieces


class FakeSocket:
    """Gives what it has, in pieces as large as are asked for, and then raises."""

    def __init__(self, data: bytes, end: Exception | None) -> None:
        self.data = data
        self.end = end
        self.asked = 0

    def recv(self, size: int) -> bytes:
        self.asked += 1
        if not self.data and self.end:
            raise self.end
        piece, self.data = self.data[:size], self.data[size:]
        return piece


def received(kind: type, socket: FakeSocket) -> tuple[bytes, Any]:
    take_large_pieces()
    return kind._sock_recv(SimpleNamespace(_sock=socket))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [KafkaTCPTransport, KafkaSSLTransport])
@pytest.mark.parametrize("end", [BlockingIOError(), InterruptedError(), ssl.SSLWantReadError()])
def test_all_that_is_there_comes_in_few_pieces(kind: type, end: Exception) -> None:
    data = bytes(range(256)) * (5 * PIECE_BYTES // 512)
    socket = FakeSocket(data, end)
    assert received(kind, socket) == (data, None)
    assert socket.asked == 4


def test_what_came_before_the_end_of_a_connection_is_given_before_it() -> None:
    for end in (None, ConnectionResetError("gone")):
        socket = FakeSocket(b"last", end)
        assert received(KafkaTCPTransport, socket) == (b"last", None)
        data, error = received(KafkaTCPTransport, socket)
        assert data == b"" and isinstance(error, KafkaConnectionError)
