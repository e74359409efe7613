"""The list of ranks: who may join it, who is refused with what both sides have, and what a stranger can do."""

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent.config import Config, ConfigError, Training, load
from agent.sharing import members
from agent.sharing.members import Connection, Gone, Members, Refused, join
from agent.sharing.start import secret_of

SECRET = b"0123456789abcdef"
TERMS = {"torch": "2.9.0", "method.name": "gapstream", "method.seed": "0"}
FACTS = {"host": "there", "process": 7, "device": "cpu", "number": None}


@pytest.fixture
def trainer() -> Iterator[Members]:
    trainer = Members(TERMS, SECRET, "127.0.0.1", 0)
    yield trainer
    trainer.close()


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def until_closed(stranger: socket.socket) -> None:
    with suppress(ConnectionError):
        while stranger.recv(4096):
            pass


def joined(trainer: Members, **facts: object) -> Connection:
    before = len(trainer.there())
    connection = join((trainer.host, trainer.port), SECRET, TERMS, FACTS | facts)
    eventually(lambda: len(trainer.there()) == before + 1)
    return connection


def test_ranks_that_join_are_there_until_they_leave_the_machines_own_ones_first(trainer):
    # given
    far, second, first = (joined(trainer, host=h, number=n) for h, n in (("far", None), ("own", 2), ("own", 1)))
    assert [(m.facts["host"], m.facts["number"]) for m in trainer.there()] == [("own", 1), ("own", 2), ("far", None)]

    # when
    second.close()

    # then
    eventually(lambda: len(trainer.there()) == 2)
    own, last = trainer.there()
    own.connection.send({"task": 1})
    assert first.receive(5) == {"task": 1}
    far.send({"failed": "no memory"})
    assert last.connection.receive(5) == {"failed": "no memory"}


def test_a_rank_without_the_secret_is_refused(trainer):
    with pytest.raises(Refused, match=r"its secret is not the one in training\.secret_file"):
        join((trainer.host, trainer.port), b"another secret..", TERMS, FACTS)
    assert trainer.there() == []


@pytest.mark.parametrize(
    ("name", "theirs", "told"),
    [
        ("torch", "2.10.0", "torch is 2.10.0 for this rank and 2.9.0 for the trainer"),
        ("method.seed", "1", "method.seed is 1 for this rank and 0 for the trainer"),
        ("method.new", "5", "method.new is 5 for this rank and missing for the trainer"),
    ],
)
def test_a_rank_of_another_version_model_or_configuration_is_refused_with_both_sides_named(trainer, name, theirs, told):
    with pytest.raises(Refused, match=told):
        join((trainer.host, trainer.port), SECRET, TERMS | {name: theirs}, FACTS)
    assert trainer.there() == []


def test_a_rank_does_not_trust_a_trainer_without_the_secret():
    # given one that takes whatever proof it is shown
    class Impostor(Members):
        def _welcome(self, connection):
            connection.send({"gapstream ranks": members.PROTOCOL, "nonce": "1"})
            connection.receive(5)
            connection.send({"proof": "2"})
            return connection.receive(5)

    impostor = Impostor(TERMS, b"guessed", "127.0.0.1", 0)

    # when, then
    with pytest.raises(Refused, match="does not know the secret"):
        join((impostor.host, impostor.port), SECRET, TERMS, FACTS)
    impostor.close()


def test_a_trainer_of_another_protocol_is_named(trainer, monkeypatch):
    monkeypatch.setattr(members, "PROTOCOL", 3)  # the trainer of this test sends it late: both are one module
    connection = Connection(socket.create_connection((trainer.host, trainer.port)))
    assert connection.receive(5)["gapstream ranks"] == 3
    connection.close()


def test_a_proof_of_one_side_is_none_of_the_other():
    assert members._proof(SECRET, "rank", "a", "b") != members._proof(SECRET, "trainer", "a", "b")
    assert members._proof(SECRET, "rank", "a", "b") != members._proof(SECRET, "rank", "b", "a")


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!I", 2**32 - 1),
        struct.pack("!I", 4) + b"null",
        struct.pack("!I", 3) + b"{1}",
        struct.pack("!I", 60_000) + b"[" * 60_000,
        struct.pack("!I", 2) + b"{}",
        struct.pack("!I", 22) + b'{"proof": "\\u00e9"}    ',
        b"",
    ],
)
def test_what_is_no_message_ends_its_connection_and_nothing_else(trainer, said):
    with socket.create_connection((trainer.host, trainer.port)) as stranger:
        stranger.settimeout(5)
        with suppress(ConnectionError, OSError):  # it may be closed, or reset, before all is said
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
        until_closed(stranger)
    joined(trainer).close()


def test_silent_strangers_take_no_more_than_their_places_and_are_shown_out(monkeypatch):
    # given as many as may be at their beginning
    monkeypatch.setattr(members, "HANDSHAKE_S", 0.5)
    trainer = Members(TERMS, SECRET, "127.0.0.1", 0)
    strangers = [socket.create_connection((trainer.host, trainer.port)) for _ in range(members.STRANGERS + 3)]

    # when they are let wait, then each is closed, and ranks may join again
    for stranger in strangers:
        stranger.settimeout(5)
        with stranger:
            until_closed(stranger)
    joined(trainer).close()
    trainer.close()


def test_half_a_message_is_no_longer_waited_for_than_a_whole_one(monkeypatch):
    monkeypatch.setattr(members, "HANDSHAKE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        here, _ = server.accept()
        there.sendall(b"\0\0\0\5{")
        with here, pytest.raises(Gone):
            Connection(here).receive(None)


def test_an_address_to_join_at_asks_for_a_secret(tmp_path):
    with pytest.raises(ValueError, match="where anyone could join; expected a secret_file"):
        Training(listen="127.0.0.1:29400")
    Training(listen="0.0.0.0:29400", secret_file=tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"training\.listen.*: got 'trainer', expected HOST:PORT"):
        load(None, {}, {"training.listen": "trainer", "training.secret_file": "secret"})


def test_a_secret_is_read_from_its_file_and_must_not_be_guessable(tmp_path: Path):
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot be read"):
        secret_of(Training(secret_file=file))
    file.write_text("too short\n")
    with pytest.raises(ConfigError, match="has 9 characters, expected 16 or more"):
        secret_of(Training(secret_file=file))
    file.write_text(f"{SECRET.decode()}\n")
    assert secret_of(Training(secret_file=file)) == SECRET
    assert secret_of(Training()) != secret_of(Training())
    assert not Config().training.shared and Training(processes=2).shared
    assert Training(listen="127.0.0.1:0", secret_file=file).shared
