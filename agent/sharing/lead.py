"""The trainer as rank 0: it starts the ranks of its machine, lets others join, and shares each task with them."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from agent.config import Config
from agent.config.training import parted
from agent.methods.base import Method
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.images import LoadedImages
from agent.scoring.scored_images import Wanted
from agent.sharing import deal, scores
from agent.sharing.deal import Rows
from agent.sharing.machine import SharingError, device_of, interface_of, threads_of, use_interface
from agent.sharing.members import Gone, Member, Members
from agent.sharing.start import RankProcess, secret_of
from agent.values import OnProgress, Progress, Share
from agent.worker import RankLost
from streams.buffer import Task

log = logging.getLogger(__name__)

_LOOK_S = 0.2
"""Seconds between two looks whether a rank has joined: chosen by hand, short beside an update."""

_LAST_WORDS_S = 2.0
"""Seconds in which a rank may say why it fails before it is taken for one that cannot: chosen by hand."""


class Sharing:
    """It shares updates with other ranks, where that is configured; else everything here gives what it was given."""

    def __init__(self, config: Config, clip: Clip) -> None:
        """Begin to listen, and start this machine's other ranks. Raises ConfigError, SharingError."""
        self._config = config
        self._settings = config.training
        self._clip = clip
        self._members: Members | None = None
        self._own: dict[int, RankProcess] = {}
        self._with: Sequence[Member] = ()
        self.shares: tuple[Share, ...] = ()
        """What became of the last update's ranks; empty where the trainer was alone."""
        if self._settings.shared:
            device_of(config, 0)  # raises where there are fewer devices than ranks
            host, port = parted(self._settings.listen) if self._settings.listen else ("127.0.0.1", 0)
            self._secret = secret_of(self._settings)
            try:
                self._members = Members(deal.terms(config, clip), self._secret, host, port)
            except OSError as error:
                raise SharingError(
                    f"training.listen: {host}:{port} cannot be listened on ({error.strerror or error}); set it to an "
                    "address of this machine that is free"
                ) from error
            self._start()
            if self._settings.listen:
                log.info("ranks may join at %s:%d", host, self._members.port)

    @contextmanager
    def together(self, task: Task, method: Method, on_progress: OnProgress) -> Iterator[None]:
        """Share what happens in the block with all ranks that are there: they have the learner and their images then.

        Raises RankLost when one of them is gone, in the block too.
        """
        self.shares, self._with = (), self._assembled(task, on_progress) if self._members else ()
        if not self._with:
            yield
            return
        log.info("task %d is shared by %d ranks", task.number, len(self._with) + 1)
        started, waited, threads = time.perf_counter(), ranks.waited_s(), torch.get_num_threads()
        try:
            with self._group(task.number):
                torch.set_num_threads(threads_of(self._config))
                deal.give(task.number, method.state(), [sample.read for sample in task.samples])
                yield
                self._tell({"go on": True})  # there is nothing more to score
            wall = time.perf_counter() - started
            own = {"host": socket.gethostname(), "process": os.getpid(), "device": str(self._clip.device)}
            shares = [_share(own, {"seconds": wall, "waited_s": ranks.waited_s() - waited})]
            for member in self._with:
                shares.append(_share(member.facts, self._heard(member)))
        except (ranks.RankGone, dist.DistError, Gone) as error:
            raise RankLost(self._whom(error)) from error
        finally:
            torch.set_num_threads(threads)
        self.shares = tuple(shares)

    def own(self, count: int) -> range:
        """Give those of `count` images that this process decodes."""
        return deal.share(count, 0) if self._with else range(count)

    def joined(self, own: LoadedImages, count: int) -> LoadedImages:
        """Make of what was decoded here what all ranks have decoded."""
        return deal.joined(own, count, self._clip) if self._with else own

    def go_on(self, rows: Rows, prepare: Callable[[], None]) -> None:
        """Let the ranks predict and learn these images, after `prepare()`, for which they wait as long as it takes.
        A trainer that is alone has no need of it."""
        if not self._with:
            return
        prepare()
        self._tell({"go on": True})
        ranks.told(rows.to_json())

    def ask(self, wanted: Wanted, serials: Sequence[int], read: Sequence[Callable[[], bytes]]) -> None:
        """Let the ranks encode images to be scored, see agent.sharing.scores: before `go_on`, and once the update is
        done."""
        self._tell({"encode": True})
        scores.ask(wanted, serials, read)

    def _tell(self, message: Mapping[str, Any]) -> None:
        """Tell all ranks what they wait for without a bound."""
        for member in self._with:
            member.connection.send(message)

    def close(self) -> None:
        """End this machine's other ranks, and hang up on those of others."""
        if self._members is not None:
            self._members.close()
        for process in self._own.values():
            process.stop()

    def _start(self) -> None:
        assert self._members is not None
        for number in range(1, self._settings.processes):
            process = self._own.get(number)
            if process is None or process.ended() is not None:
                address = (self._members.host, self._members.port)
                self._own[number] = RankProcess(self._config, address, self._secret, number, own=True)

    def _assembled(self, task: Task, on_progress: OnProgress) -> list[Member]:
        """Wait for the ranks of an update. Raises RankLost when too few come."""
        assert self._members is not None
        settings, until = self._settings, time.monotonic() + self._settings.join_s
        while True:
            members = self._members.there()
            own = sum(member.own for member in members) + 1
            if own >= settings.processes and len(members) + 1 >= settings.ranks:
                return members
            if time.monotonic() > until:
                text = (
                    f"after {settings.join_s:g} s {own} rank(s) of this machine are there, {len(members) + 1} in all; "
                    f"expected were {settings.processes} and {max(settings.ranks, settings.processes)}"
                )
                if not settings.fewer:
                    raise RankLost(f"{text} (training.fewer is false)")
                log.warning("%s; the update begins with these", text)
                return members
            self._start()
            on_progress(Progress("decode", task.number))
            time.sleep(_LOOK_S)

    @contextmanager
    def _group(self, number: int) -> Iterator[None]:
        assert self._members is not None
        settings, size = self._settings, len(self._with) + 1
        # Bound by us: torch's own socket would listen on every address of this machine.
        listening = socket.create_server((self._members.host, 0))
        interface = interface_of(next((m.connection.here for m in self._with if not m.own), "127.0.0.1"))
        for rank, member in enumerate(self._with, 1):
            port = listening.getsockname()[1]
            order = {"task": number, "rank": rank, "size": size, "port": port, "timeout_s": settings.timeout_s}
            member.connection.send(order | ({"interface": interface} if member.own else {}))
        for member in self._with:  # one that has gone shows at once here, and only after its time in a collective
            member.connection.receive(settings.timeout_s)
        use_interface(interface)
        timeout = timedelta(seconds=settings.timeout_s)
        port, handle = listening.getsockname()[1], listening.detach()
        store = dist.TCPStore(
            self._members.host,
            port,
            size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=handle,
        )
        with ranks.group(store, 0, size, settings.timeout_s, self._clip.device):
            yield

    def _heard(self, member: Member) -> dict[str, Any]:
        """Wait for what a rank says of its part. Raises Gone, as TimeoutError may be of the disk."""
        try:
            return member.connection.receive(self._settings.timeout_s)
        except TimeoutError as error:
            raise Gone(f"nothing came in {self._settings.timeout_s:g} s") from error

    def _whom(self, error: Exception) -> str:
        """Say which ranks are lost, as far as that can be told."""
        told, until = [], time.monotonic() + _LAST_WORDS_S
        for rank, member in enumerate(self._with, 1):
            try:
                failed = str(member.connection.receive(max(0.0, until - time.monotonic())).get("failed", ""))
            except TimeoutError:
                continue
            except Gone:
                told.append(f"rank {rank}, {member.name}, is gone")
            else:
                # What it says of a lost rank it says of another one.
                if failed and not failed.startswith(ranks.RankGone.__name__):
                    told.append(f"rank {rank}, {member.name}, failed: {failed}")
        text = " ".join(str(error).split())[:300]
        return "; ".join(told) or f"no rank is known to be gone, but one was not heard: {text}"


def _share(facts: Mapping[str, Any], told: Mapping[str, Any]) -> Share:
    """Say what a rank's part in an update was."""
    if "failed" in told:
        raise Gone(f"rank {facts.get('host')} failed: {told['failed']}")
    return Share(
        host=str(facts.get("host")),
        process=int(facts.get("process", 0)),
        device=str(facts.get("device")),
        seconds=float(told["seconds"]),
        waited_s=float(told["waited_s"]),
    )
