"""The trainer's list of ranks: a TCP port where they prove that they know the secret and that they are of its kind.

Not torch's elastic rendezvous, which unpickles what it finds in its store and restarts every process when one joins: a
trainer is watched and started again already, so a list and a refusal are all that is missing. The connection stays:
orders go out on it, and its end tells of a rank that is gone, or of a trainer.

A message is four bytes of length and as much JSON. Before anything else both sides show, by HMAC-SHA256 over fresh
random numbers, that they have the secret. That keeps out whoever does not have it; it neither encrypts nor signs what
is sent later, here or by torch.distributed, so a network that others can listen to or write to is no place for this.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

PROTOCOL = 2
"""The version of these messages; a rank with another is refused before anything else is compared."""

MESSAGE_BYTES = 2**16
"""A longer message ends the connection. Orders and terms have some thousand bytes; images and models do not go this
way."""

HANDSHAKE_S = 10.0
"""Seconds that each message of a beginning may take: chosen by hand; a rank is loaded before it connects."""

STRANGERS = 16
"""Connections that may be at their beginning at once; one more is closed. Chosen by hand: without a bound whoever
reaches the port could take all file descriptors of the trainer."""

_IDLE_S, _PROBE_S, _PROBES = 30, 10, 3
"""A peer that was cut off is missed after 30 + 3 * 10 seconds of silence, by TCP's keep-alive: chosen by hand. While an
update runs, training.timeout_s tells earlier or later."""


class Gone(Exception):
    """The other side has closed the connection, is silent for too long, or does not speak this protocol."""


class Refused(Exception):
    """A rank may not join; the message names what both sides have."""


class Connection:
    """It sends and receives messages, JSON objects, over a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", _IDLE_S), ("TCP_KEEPINTVL", _PROBE_S), ("TCP_KEEPCNT", _PROBES)):
            if hasattr(socket, name):  # Linux has all of them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def here(self) -> str:
        """This side's address."""
        return str(self._socket.getsockname()[0])

    @property
    def there(self) -> str:
        """The other side's address."""
        with contextlib.suppress(OSError):
            return str(self._socket.getpeername()[0])
        return "unknown"

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Raises Gone."""
        data = json.dumps(message).encode()
        assert len(data) <= MESSAGE_BYTES, "only small things go this way"
        try:
            self._socket.settimeout(HANDSHAKE_S)
            self._socket.sendall(struct.pack("!I", len(data)) + data)
        except OSError as error:
            raise Gone(str(error)) from error

    def receive(self, timeout_s: float | None) -> dict[str, Any]:
        """Wait for a message, for ever with None. Raises Gone, and TimeoutError when nothing of one has come."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        [length] = struct.unpack("!I", self._bytes(4, until))
        if length > MESSAGE_BYTES:
            raise Gone(f"a message of {length} bytes, expected at most {MESSAGE_BYTES}")
        try:
            message = json.loads(self._bytes(length, time.monotonic() + HANDSHAKE_S))
        except (ValueError, RecursionError, TimeoutError) as error:
            raise Gone(f"no message: {error}") from error
        if not isinstance(message, dict):
            raise Gone("a message that is no JSON object")
        return message

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _bytes(self, count: int, until: float | None) -> bytes:
        data = b""
        while len(data) < count:
            try:
                self._socket.settimeout(None if until is None else max(0.001, until - time.monotonic()))
                part = self._socket.recv(count - len(data))
            except TimeoutError:
                if data:
                    raise Gone("half a message") from None
                raise
            except OSError as error:
                raise Gone(str(error)) from error
            if not part:
                raise Gone("the connection was closed")
            data += part
        return data


@dataclass(eq=False)
class Member:
    """It is a rank that has joined."""

    connection: Connection
    facts: Mapping[str, Any]
    """What it says of itself: `host`, `process`, `device`, and `number` where it is one of this machine's own."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.facts.get('host')} (process {self.facts.get('process')}, {self.facts.get('device')})"

    @property
    def own(self) -> bool:
        """Whether the trainer has started it itself."""
        return self.facts.get("number") is not None

    def there(self) -> bool:
        """Tell whether the connection is open. Nothing is expected of a rank that has no order."""
        try:
            self.connection.receive(0)
        except TimeoutError:
            return True
        except Gone:
            pass
        return False


class Members:
    """It lets ranks join, from the moment it is built until it is closed, and knows those that are there."""

    def __init__(self, terms: Mapping[str, str], secret: bytes, host: str, port: int) -> None:
        """terms: what a rank must have in common with the trainer. Raises OSError when the address cannot be had."""
        self._terms = dict(terms)
        self._secret = secret
        self._socket = socket.create_server((host, port), backlog=STRANGERS)
        self.host, self.port = self._socket.getsockname()[:2]
        self._lock = threading.Lock()
        self._members: list[Member] = []
        self._strangers = threading.Semaphore(STRANGERS)
        threading.Thread(target=self._accept, name="ranks", daemon=True).start()

    def there(self) -> list[Member]:
        """Give the ranks that are there, the trainer's own ones first, in the order in which they are numbered."""
        with self._lock:
            members = list(self._members)
        gone = [member for member in members if not member.there()]
        for member in gone:
            log.warning("rank %s has left", member.name)
            self.drop(member)
        left = [member for member in members if member not in gone]
        return sorted(left, key=lambda member: member.facts["number"] if member.own else float("inf"))

    def drop(self, member: Member) -> None:
        """Forget a rank."""
        member.connection.close()
        with self._lock:
            self._members.remove(member)

    def close(self) -> None:
        """Let nobody join any more, and hang up on all."""
        self._socket.close()
        with self._lock:
            for member in self._members:
                member.connection.close()
            self._members.clear()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                if self._socket.fileno() < 0:
                    return
                time.sleep(0.1)  # no file descriptor is free, say
                continue
            if not self._strangers.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._begin, args=(Connection(sock),), name="rank-begins", daemon=True).start()

    def _begin(self, connection: Connection) -> None:
        try:
            facts = self._welcome(connection)
        except (Gone, Refused, TimeoutError) as error:
            log.warning("%s may not join as a rank: %s", connection.there, error)
            connection.close()
        else:
            member = Member(connection, facts)
            with self._lock:
                self._members.append(member)
            log.info("rank %s has joined", member.name)
        finally:
            self._strangers.release()

    def _welcome(self, connection: Connection) -> dict[str, Any]:
        ours = secrets.token_hex(16)
        connection.send({"gapstream ranks": PROTOCOL, "nonce": ours})
        hello = connection.receive(HANDSHAKE_S)
        theirs = str(hello.get("nonce"))
        # The rank goes first: a stranger learns nothing that the secret went into.
        if not _proves(hello, _proof(self._secret, "rank", ours, theirs)):
            raise self._refuse(connection, "its secret is not the one in training.secret_file of the trainer")
        connection.send({"proof": _proof(self._secret, "trainer", theirs, ours)})
        asked = connection.receive(HANDSHAKE_S)
        terms, facts = asked.get("terms"), asked.get("facts")
        if not isinstance(terms, dict) or not isinstance(facts, dict):
            raise self._refuse(connection, "it did not say what it is")
        if differences := different(self._terms, terms):
            raise self._refuse(connection, differences)
        connection.send({"welcome": True})
        return facts

    def _refuse(self, connection: Connection, why: str) -> Refused:
        with contextlib.suppress(Gone):
            connection.send({"refused": why})
        return Refused(why)


def join(address: tuple[str, int], secret: bytes, terms: Mapping[str, str], facts: Mapping[str, Any]) -> Connection:
    """Join the trainer at an address as a rank. Raises OSError, Gone, Refused."""
    connection = Connection(socket.create_connection(address, timeout=HANDSHAKE_S))
    try:
        greeting = connection.receive(HANDSHAKE_S)
        if greeting.get("gapstream ranks") != PROTOCOL:
            raise Refused(
                f"the trainer speaks version {greeting.get('gapstream ranks')} of the protocol for ranks, this process "
                f"version {PROTOCOL}; run the same version of gapstream on both machines"
            )
        theirs, ours = str(greeting.get("nonce")), secrets.token_hex(16)
        connection.send({"nonce": ours, "proof": _proof(secret, "rank", theirs, ours)})
        answer = _unless_refused(connection.receive(HANDSHAKE_S))
        if not _proves(answer, _proof(secret, "trainer", ours, theirs)):
            raise Refused("whoever answers there does not know the secret in training.secret_file; check the address")
        connection.send({"terms": dict(terms), "facts": dict(facts)})
        _unless_refused(connection.receive(HANDSHAKE_S))
    except TimeoutError as error:
        connection.close()
        raise Gone(f"the trainer said nothing for {HANDSHAKE_S:.0f} s") from error
    except (Gone, Refused):
        connection.close()
        raise
    return connection


def different(trainer: Mapping[str, str], rank: Mapping[str, Any]) -> str:
    """Say in which terms a rank differs from its trainer, and how; empty when in none."""
    return "; ".join(
        f"{name} is {rank.get(name, 'missing')} for this rank and {trainer.get(name, 'missing')} for the trainer"
        for name in sorted(trainer.keys() | rank.keys())
        if trainer.get(name) != rank.get(name)
    )


def _unless_refused(message: dict[str, Any]) -> dict[str, Any]:
    if "refused" in message:
        raise Refused(str(message["refused"]))
    return message


def _proves(message: Mapping[str, Any], proof: str) -> bool:
    return hmac.compare_digest(str(message.get("proof")).encode(), proof.encode())


def _proof(secret: bytes, who: str, asked: str, own: str) -> str:
    """Prove to know the secret: to whoever sent the random number `asked`, in a word that nobody else sends."""
    return hmac.new(secret, f"gapstream {who} {asked} {own}".encode(), hashlib.sha256).hexdigest()
