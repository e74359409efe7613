"""Runs the learner: in a spawned child that may die without harm, or in this process for debugging and tests.

A worker has at most one task in hand. `submit` and `poll` return at once; whatever goes wrong with the learner comes
out of `poll` as one WorkerDied, after which the worker has no task and can be given one again.
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
from typing import Any, Literal, Protocol

from agent.config import Config
from agent.process import LOG_FORMAT
from agent.values import Outcome, Progress
from streams.buffer import Task
from streams.source import SpoolError

log = logging.getLogger(__name__)

TRAINER = "agent.trainer:Trainer"
_PROGRESS_EVERY_S = 0.1

FailureKind = Literal["start", "error", "died", "silent"]


class Learner(Protocol):
    """What runs in the worker. Built as `Class(config, commit)`; `commit` is None when nothing was learned yet."""

    def learn(self, task: Task, staging: Path, on_progress: Callable[[Progress], None]) -> Outcome: ...


class WorkerDied(Exception):
    """The learner is gone, and with it the task it had. `str()` is one line for people, `details` a traceback or ''.

    `kind`: `start` (it could not be set up at all), `error` (it raised), `died` (killed, crashed), `silent` (it hung
    and was killed). `blames_task` is False when the task cannot be the reason: the learner had not been set up yet, or
    the disk refused.
    """

    def __init__(self, kind: FailureKind, message: str, details: str = "", blames_task: bool = True) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details
        self.blames_task = blames_task


class Worker(Protocol):
    """The contract of both workers."""

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
        """The newest news, if any. Raises WorkerDied."""

    def stop(self, timeout_s: float) -> None:
        """Give the learner so long to end by itself, then kill it. A task in hand is lost."""


@dataclass(frozen=True)
class _Ready:
    pass


@dataclass(frozen=True)
class _Failed:
    message: str
    details: str
    blames_task: bool

    @classmethod
    def now(cls, error: Exception) -> _Failed:
        """Of the exception being handled."""
        return cls(_one_line(error), traceback.format_exc(), not isinstance(error, OSError | SpoolError))


@dataclass(frozen=True)
class _Gone:
    """The child's end of the pipe is closed: nothing more will come."""


@dataclass
class _Child:
    process: multiprocessing.process.BaseProcess
    tasks: Connection
    news: queue.SimpleQueue[Any]


class ProcessWorker:
    """The learner in a spawned child. It lives from task to task, and never longer than this process."""

    def __init__(
        self,
        config: Config,
        learner: str = TRAINER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._learner = learner
        self._clock = clock
        self._child: _Child | None = None
        self._heard = 0.0
        self.idle = True
        self.ready = False

    @property
    def pid(self) -> int | None:
        """Of the child; None when there is none."""
        return self._child.process.pid if self._child else None

    def start(self, commit: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        task_reader, task_writer = context.Pipe(duplex=False)
        news_reader, news_writer = context.Pipe(duplex=False)
        process = context.Process(
            target=_child_main,
            args=(self._config, self._learner, commit, task_reader, news_writer),
            name="gapstream-trainer",
            daemon=True,
        )
        process.start()
        task_reader.close()
        news_writer.close()
        self._child = _Child(process, task_writer, queue.SimpleQueue())
        self._heard = self._clock()
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
        self._heard = self._clock()
        # A thread, because a pipe holds 64 KiB and the child may still be loading the model: the loop must not wait.
        threading.Thread(
            target=_send, args=(self._child.tasks, (task, staging)), name="trainer-task", daemon=True
        ).start()

    def poll(self) -> Progress | Outcome | None:
        if self._child is None:
            return None
        newest: Progress | None = None
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._child.news.get_nowait()
                self._heard = self._clock()
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
                        self._fail(kind, message.message, message.details, message.blames_task)
                    case _Gone():
                        self._child.process.join(timeout=1)
                        how = _how_it_ended(self._child.process.exitcode)
                        if self.idle and self.ready:
                            log.warning("idle trainer %s; it is started again for the next task", how)
                            self._bury()
                            return newest
                        self._fail("died", f"trainer {how}")
        silent = self._clock() - self._heard
        if silent > self._config.agent.trainer_silent_s and not (self.idle and self.ready):
            self._fail("silent", f"trainer said nothing for {silent:.0f} s (agent.trainer_silent_s) and was killed")
        return newest

    def stop(self, timeout_s: float) -> None:
        if self._child is not None and self._child.process.is_alive():
            self._child.process.terminate()
            self._child.process.join(timeout_s)
        self._bury()

    def _fail(self, kind: FailureKind, message: str, details: str = "", blames_task: bool = True) -> None:
        blames_task &= self.ready
        self._bury()
        raise WorkerDied(kind, message, details, blames_task)

    def _bury(self) -> None:
        """Make sure that nobody writes to a staging folder any more."""
        if self._child is not None:
            self._child.process.kill()
            self._child.process.join()
            self._child.tasks.close()
        self._child = None
        self.idle = True
        self.ready = False


class InlineWorker:
    """The same contract in this process: `poll` learns the whole task before it returns."""

    def __init__(self, config: Config, learner: str = TRAINER) -> None:
        self._config = config
        self._class = learner
        self._learner: Learner | None = None
        self._task: tuple[Task, Path] | None = None

    @property
    def idle(self) -> bool:
        return self._task is None

    @property
    def ready(self) -> bool:
        return self._learner is not None

    def start(self, commit: Path | None) -> None:
        try:
            self._learner = _load(self._class)(self._config, commit)
        except Exception as error:
            raise WorkerDied("start", _one_line(error), traceback.format_exc(), blames_task=False) from error

    def submit(self, task: Task, staging: Path, commit: Path | None) -> None:
        assert self.idle, "one task at a time"
        if self._learner is None:
            self.start(commit)
        self._task = task, staging

    def poll(self) -> Progress | Outcome | None:
        if self._task is None or self._learner is None:
            return None
        (task, staging), self._task = self._task, None
        try:
            return self._learner.learn(task, staging, lambda progress: None)
        except Exception as error:
            self._learner = None
            failed = _Failed.now(error)
            raise WorkerDied("error", failed.message, failed.details, failed.blames_task) from error

    def stop(self, timeout_s: float) -> None:
        self._task = self._learner = None


def _child_main(config: Config, learner: str, commit: Path | None, tasks: Connection, news: Connection) -> None:
    _die_with_parent()
    # Ctrl-C reaches the whole process group, but when the trainer ends is for the agent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    faulthandler.enable()
    logging.basicConfig(level=config.agent.log_level, format=LOG_FORMAT)
    # onnxruntime's quantisation logs a line for every node it leaves alone, as nobody in particular.
    logging.getLogger().addFilter(lambda record: record.levelno > logging.INFO)
    if config.model.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.model.threads)
    try:
        learning: Learner = _load(learner)(config, commit)
        news.send(_Ready())
        on_progress = _ProgressSender(news)
        while True:
            try:
                task, staging = tasks.recv()
            except EOFError:
                return
            news.send(learning.learn(task, staging, on_progress))
    except Exception as error:
        news.send(_Failed.now(error))


class _ProgressSender:
    """Sends progress often enough to watch and seldom enough never to fill the pipe."""

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


def _receive(news: Connection, into: queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(EOFError, OSError), news:
        while True:
            into.put(news.recv())
    into.put(_Gone())


def _send(tasks: Connection, message: Any) -> None:
    """A child that is gone shows in the news; here it is no error."""
    with contextlib.suppress(OSError):
        tasks.send(message)


def _die_with_parent() -> None:
    """The kernel kills us with the parent's thread (Linux); a watcher does where there is no such call."""
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
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
