"""What a broker sends, taken from the socket in large pieces.

kafka-python 3.0 takes 4 KiB at a time, and every call gives up the interpreter's lock: while another thread is at work,
as the one that writes to the spool, the client waits for it after each piece, up to 5 ms. Of small records this was an
eighth of the processor time of reading them, and much more of the time by the clock.
"""

from __future__ import annotations

import ssl
from typing import Any

from kafka.errors import KafkaConnectionError
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

PIECE_BYTES = 256 * 2**10
"""Bytes asked for at a time. Chosen by measurement: 1 MiB is no faster, and each piece takes its memory anew."""


def take_large_pieces() -> None:
    """Make all clients of this process read so; called again it changes nothing.

    This replaces a private method of the client, which is why its version is pinned to 3.0.
    """
    KafkaTCPTransport._sock_recv = KafkaSSLTransport._sock_recv = _receive


def _receive(transport: Any) -> tuple[bytes, Exception | None]:
    """Give what the socket has, or else what ended the connection, if anything did.

    The client drops what comes beside an error. A broker that refuses a login says why and closes the connection at
    once, so that what it says comes first, and the end by the next call, which finds it again.
    """
    pieces: list[bytes] = []
    error: Exception | None = None
    while error is None:
        try:
            piece = transport._sock.recv(PIECE_BYTES)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            break  # there is no more for now
        except Exception as failure:
            error = KafkaConnectionError(failure)
        else:
            if piece:
                pieces.append(piece)
            else:
                error = KafkaConnectionError("the broker closed the connection")
    return b"".join(pieces), None if pieces else error
