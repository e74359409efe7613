"""Runs the learner in a spawned child, which may die without harm: it is watched, and started again.

A worker has at most one task in hand. `submit` and `poll` return at once; whatever goes wrong with the learner comes
out of `poll` as one WorkerDied, after which the worker has no task and can be given one again.

Two pipes lead to the child and back. Tasks go in as `_Order`; `_Ready`, Progress, Outcome and `_Failed` come out. The
child is spawned, not forked: a fork would copy the locks of this process's threads in whatever state they are in, and
CUDA cannot be used in a forked child.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

from agent.config import Config
from agent.process import stderr_handler
from agent.values import OnProgress, Outcome, Progress
from streams.buffer import Task

log = logging.getLogger(__name__)

TRAINER = "agent.trainer:Trainer"
"""The learner, by name: importing it needs torch, which only the child may load."""

FLEET_TRAINER = "agent.fleet_trainer:FleetTrainer"
"""That of a site of a fleet."""

_PROGRESS_EVERY_S = 0.1
"""Least time between two messages of the same epoch: chosen by hand, faster than anybody looks. More messages would
only fill the pipe while this process is busy with a commit."""

FailureKind = Literal["start", "error", "died", "silent", "rank"]
"""How a learner ended. `start`: it could not be set up at all; `error`: it raised; `died`: it was killed or crashed;
`silent`: it said nothing for agent.trainer_silent_s and was killed; `rank`: another process of its update was lost."""


class Learner(Protocol):
    """What runs in the child. It is built as `Class(config, commit)`; `commit` is None when nothing was learned yet."""

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        """Learn `task` and leave the next commit, but for its manifest, in the empty folder `staging`.

        Raises TaskFault when the task's data are the reason why it cannot.
        """


class TaskFault(Exception):
    """A learner raises this from the exception by which it knows that the task's own data cannot be learned.

    Everything else that ends a learner is the machine's doing: a full or failing disk, memory, CUDA, a kill. The
    machine is the rule and the data are the exception, since a wrong "machine" costs a stop that somebody looks at, and
    a wrong "data" takes good samples out of the stream.
    """


class RankLost(Exception):
    """A learner raises this when one of the processes that share its update is gone or silent; see agent.sharing."""


class WorkerDied(Exception):
    """The learner is gone, and with it the task it had. `str()` is one line for people, `details` a traceback or ''.

    `blames_task` is True only when the learner said so with a TaskFault.
    """

    def __init__(self, kind: FailureKind, message: str, details: str = "", blames_task: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details
        self.blames_task = blames_task

    @property
    def at_start(self) -> bool:
        """Whether the learner could not be set up at all."""
        return self.kind == "start"


class Worker(Protocol):
    """What the pipeline needs of a worker: one task at a time, and never a wait."""

    @property
    def idle(self) -> bool:
        """True when a task may be submitted."""

    @property
    def ready(self) -> bool:
        """True once the learner has been set up."""

    def start(self, commit: Path | None) -> None:
        """Set the learner up from `commit` (None: nothing learned yet) before there is a task for it."""

    def submit(self, task: Task, staging: Path, commit: Path | None) -> None:
        """Learn `task` into `staging`. A learner that is not there is set up from `commit` first."""

    def poll(self) -> Progress | Outcome | None:
        """Give the newest news, or None when there is none. Raises WorkerDied."""

    def stop(self, timeout_s: float) -> None:
        """Let the learner end by itself within `timeout_s`, then kill it. A task in hand is lost."""


@dataclass(frozen=True)
class _Order:
    """It tells the child a task to learn, and the folder to leave the next commit in."""

    task: Task
    staging: Path


@dataclass(frozen=True)
class _Ready:
    """The child says that the learner is set up."""


@dataclass(frozen=True)
class _Failed:
    """The child says that an exception ended it."""

    message: str
    """The exception in one line."""
    details: str
    """Its traceback."""
    blames_task: bool
    lost_rank: bool

    @classmethod
    def now(cls, error: Exception) -> _Failed:
        """Describe the exception being handled."""
        blames_task = isinstance(error, TaskFault)
        told = _one_line(error.__cause__ or error if blames_task else error)
        return cls(told, traceback.format_exc(), blames_task, isinstance(error, RankLost))


@dataclass(frozen=True)
class _Gone:
    """The child's end of the pipe is closed: nothing more will come."""


_News = Progress | Outcome | _Ready | _Failed | _Gone
"""What the agent's side hears of the child."""


@dataclass(frozen=True)
class _Child:
    process: multiprocessing.process.BaseProcess
    orders: Connection
    news: queue.SimpleQueue[_News]
    """What came through the pipe, fetched by a thread so that the child never waits for this process."""


class ProcessWorker:
    """It is the learner in a spawned child. It lives from task to task, and never longer than this process."""

    def __init__(
        self,
        config: Config,
        learner: str = TRAINER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """learner: `module:Class` of the Learner, imported in the child alone. clock: seconds, for the silence rule."""
        self._config = config
        self._learner = learner
        self._clock = clock
        self._child: _Child | None = None
        self._heard_at = 0.0
        self.idle = True
        self.ready = False

    @property
    def pid(self) -> int | None:
        """Process id of the child; None when there is none."""
        return self._child.process.pid if self._child else None

    def start(self, commit: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        order_reader, order_writer = context.Pipe(duplex=False)
        news_reader, news_writer = context.Pipe(duplex=False)
        process = context.Process(
            target=_child_main,
            args=(self._config, self._learner, commit, order_reader, news_writer),
            name="gapstream-trainer",
            daemon=True,
        )
        process.start()
        # Only the child may hold the writing end of its news: the end of file that tells of its death comes when the
        # last holder has closed it.
        order_reader.close()
        news_writer.close()
        self._child = _Child(process, order_writer, queue.SimpleQueue())
        self._heard_at = self._clock()
        self.ready = False
        threading.Thread(
            target=_receive, args=(news_reader, self._child.news), name="trainer-news", daemon=True
        ).start()
        log.info("trainer started as process %d", process.pid)

    def submit(self, task: Task, staging: Path, commit: Path | None) -> None:
        assert self.idle, "one task at a time"
        if self._child is None or not self._child.process.is_alive():
            self._bury()
            self.start(commit)
        assert self._child is not None
        self.idle = False
        self._heard_at = self._clock()
        # A thread, because a pipe holds 64 KiB and the child may still be loading the model: the loop must not wait.
        threading.Thread(
            target=_send, args=(self._child.orders, _Order(task, staging)), name="trainer-task", daemon=True
        ).start()

    def poll(self) -> Progress | Outcome | None:
        if self._child is None:
            return None
        newest: Progress | None = None
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._child.news.get_nowait()
                self._heard_at = self._clock()
                match message:
                    case Progress():
                        newest = message
                    case Outcome():
                        self.idle = True
                        return message
                    case _Ready():
                        self.ready = True
                    case _Failed():
                        kind: FailureKind = "error" if self.ready else "start"
                        if message.lost_rank:
                            kind = "rank"
                        self._fail(kind, message.message, message.details, message.blames_task)
                    case _Gone():
                        self._child.process.join(timeout=1)  # the pipe closes a moment before the exit code is known
                        how = _in_words(self._child.process.exitcode)
                        if self.idle and self.ready:  # nothing is lost, so it is no failure
                            log.warning("idle trainer %s; it is started again for the next task", how)
                            self._bury()
                            return newest
                        self._fail("died", f"trainer {how}")
        silent = self._clock() - self._heard_at
        if silent > self._config.agent.trainer_silent_s and not (self.idle and self.ready):
            # It may hang where no signal handler of Python's runs, in a CUDA call or a deadlock: only a kill ends that.
            self._fail("silent", f"trainer said nothing for {silent:.0f} s (agent.trainer_silent_s) and was killed")
        return newest

    def stop(self, timeout_s: float) -> None:
        if self._child is not None and self._child.process.is_alive():
            self._child.process.terminate()
            self._child.process.join(timeout_s)
        self._bury()

    def _fail(self, kind: FailureKind, message: str, details: str = "", blames_task: bool = False) -> NoReturn:
        self._bury()
        raise WorkerDied(kind, message, details, blames_task)

    def _bury(self) -> None:
        """Make sure that nobody writes to a staging folder any more: the next task is given the same one."""
        if self._child is not None:
            self._child.process.kill()
            self._child.process.join()
            self._child.orders.close()
        self._child = None
        self.idle = True
        self.ready = False


def _child_main(config: Config, learner: str, commit: Path | None, orders: Connection, news: Connection) -> None:
    """Live the child's whole life: set the learner up, then learn what comes until the pipe is closed."""
    _die_with_parent()
    # Ctrl-C reaches the whole process group, but when the trainer ends is for the agent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    faulthandler.enable()  # a crash inside torch or CUDA leaves the Python stack on standard error
    logging.basicConfig(level=config.agent.log_level, handlers=[stderr_handler()])
    # onnxruntime's quantisation logs a line for every node it leaves alone, under no logger's name.
    logging.getLogger().addFilter(lambda record: record.levelno > logging.INFO)
    # OpenMP reads it once, when torch is imported below with the learner.
    if config.model.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.model.threads)
    try:
        learning: Learner = _load(learner)(config, commit)
        news.send(_Ready())
        on_progress = _ProgressSender(news)
        while True:
            try:
                order: _Order = orders.recv()
            except EOFError:
                return
            news.send(learning.learn(order.task, order.staging, on_progress))
    except Exception as error:
        news.send(_Failed.now(error))


class _ProgressSender:
    """Sends progress, seldom enough never to fill the pipe; the first message of an epoch always goes out, and so does
    an accuracy, which is told once."""

    def __init__(self, news: Connection) -> None:
        self._news = news
        self._sent_at = 0.0
        self._part: tuple[int, str, int] | None = None

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        part = progress.task, progress.phase, progress.epoch
        if part == self._part and progress.accuracy is None and now - self._sent_at < _PROGRESS_EVERY_S:
            return
        self._sent_at, self._part = now, part
        self._news.send(progress)


def _receive(news: Connection, into: queue.SimpleQueue[_News]) -> None:
    """Live a thread's whole life: fetch what the child sends until it is gone."""
    with contextlib.suppress(EOFError, OSError), news:
        while True:
            into.put(news.recv())
    into.put(_Gone())


def _send(orders: Connection, order: _Order) -> None:
    """Send an order. A child that is gone shows in the news; here it is no error."""
    with contextlib.suppress(OSError):
        orders.send(order)


def _die_with_parent() -> None:
    """Never outlive the agent, however it ends: an orphan would write to the state folder of the next one.

    Linux kills the child with the parent's thread that started it; elsewhere a thread watches the parent, which it does
    here too, since the parent may have died before the call.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())  # some libraries' messages have a dozen lines
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _in_words(code: int | None) -> str:
    """Say how a process ended, from its exit code: None while it has none, negative for the signal that killed it."""
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
