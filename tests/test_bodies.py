"""Bodies of requests are bounded in bytes and time, and the slowest gives way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from exporter import bodies
from exporter.bodies import Bodies, Refused


class Sender:
    """A request whose body comes as told; `rest` is sent after `go`."""

    def __init__(self, first: bytes, rest: bytes = b"", announced: int | None = None) -> None:
        self.headers = {"content-length": str(len(first + rest) if announced is None else announced)}
        self.first, self.rest, self.go, self.gone = first, rest, asyncio.Event(), False

    async def stream(self) -> AsyncIterator[bytes]:
        yield self.first
        await self.go.wait()
        if self.gone:
            raise ClientDisconnect
        yield self.rest


def whole(body: bytes, **announced: int) -> Sender:
    sender = Sender(body, **announced)
    sender.go.set()
    return sender


async def read(held: Bodies, sender: Sender) -> bytes:
    async with held.body(sender) as body:
        return body


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def refusal(reading: Coroutine[Any, Any, bytes] | asyncio.Task[bytes]) -> tuple[int, str]:
    with pytest.raises(Refused) as refused:
        await reading
    return refused.value.status, str(refused.value)


@pytest.mark.parametrize(("size", "announced", "fits"), [(10, 10, True), (11, 11, False), (11, 1, False)])
def test_a_body_may_have_so_many_bytes_whatever_it_announces(size, announced, fits):
    async def test() -> None:
        sender = whole(b"x" * size, announced=announced)
        if fits:
            assert await read(Bodies(10, 100), sender) == b"x" * size
        else:
            assert (await refusal(read(Bodies(10, 100), sender)))[0] == 413

    run(test)


def test_a_body_that_drips_is_ended_at_its_deadline(monkeypatch):
    monkeypatch.setattr(bodies, "BODY_S", 0.05)

    class Dripping(Sender):
        async def stream(self) -> AsyncIterator[bytes]:
            while True:
                yield b"x"
                await asyncio.sleep(0.001)

    async def test() -> None:
        assert (await refusal(read(Bodies(10**6, 10**6), Dripping(b""))))[0] == 408

    run(test)


def test_those_who_stopped_sending_give_way_to_one_who_sends():
    async def test() -> None:
        # given three that fill the room and say no more
        held = Bodies(40, 120)
        stopped = [asyncio.create_task(read(held, Sender(b"x" * 39, b"x"))) for _ in range(3)]
        await asyncio.sleep(1.1)

        # when others come
        assert [await read(held, whole(b"y" * 40)) for _ in range(5)] == [b"y" * 40] * 5

        # then one of them is told why, and the two that there is room for are left alone
        done, left = await asyncio.wait(stopped, timeout=0.1)
        assert len(done) == 1 and len(left) == 2
        status, why = await refusal(done.pop())
        assert status == 503 and "more than 120 bytes" in why
        for task in left:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert held._total == 0

    run(test)


def test_bodies_that_are_being_answered_are_never_given_up_for_others():
    async def test() -> None:
        held = Bodies(10, 10)
        async with held.body(whole(b"x" * 10)):
            assert (await refusal(read(held, whole(b"y"))))[0] == 503
        assert await read(held, whole(b"y")) == b"y"

    run(test)


def test_a_client_that_goes_leaves_its_room_to_others():
    async def test() -> None:
        held = Bodies(10, 10)
        sender = Sender(b"x" * 9, b"x")
        reading = asyncio.create_task(read(held, sender))
        await asyncio.sleep(0)
        sender.gone = True
        sender.go.set()
        assert (await refusal(reading))[0] == 400
        assert await read(held, whole(b"y" * 10)) == b"y" * 10

    run(test)
