"""`gapstream doctor`: looks at everything an agent needs before it runs, and says how to mend what is wrong.

Nothing is changed and nothing is learned; it may be asked beside a running agent.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from agent.commands.arguments import add_config, config_from
from agent.commits import CommitStore, StateError
from agent.config import Config, Training
from agent.config.training import parted
from agent.layout import FLEET, LOCK, SPOOL, has_learned
from agent.parts import connection, open_exchange, source_parts
from agent.process import is_ours
from agent.values import Commit
from exporter.masking import masked
from streams.source import DeadLetterError

Level = Literal["ok", "warning", "problem"]
"""How bad a finding is: a warning is for people, a problem makes the command fail."""


@dataclass(frozen=True)
class Finding:
    """A finding is what one look gave."""

    about: str
    level: Level
    text: str
    cure: str = ""
    """What to do about it; empty where the text says it."""


add_arguments = add_config


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each finding; the exit code is 1 when one is a problem."""
    config = config_from(arguments)
    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    problems = 0
    for finding in examine(config):
        problems += finding.level == "problem"
        colour = colours[finding.level]
        console.print(f"[{colour}]{finding.level:<8}[/] {finding.about:<9} {escape(masked(finding.text))}")
        if finding.cure:
            console.print(f"{'':18} -> {escape(masked(finding.cure))}")
    console.print(f"\n{problems} problem(s)" if problems else "\nready to run")
    return 1 if problems else 0


def examine(config: Config) -> Iterator[Finding]:
    """Give every finding, the quick ones first. The model is loaded, and downloaded where it is not there yet."""
    running = _lock_holder(config.state.path)
    yield _state(config.state.path, running)
    commit = None
    try:
        commit = CommitStore(config.state.path, config.state.keep_commits).verified()
        yield Finding("commit", "ok", _told(commit))
    except (StateError, OSError) as error:
        yield Finding("commit", "problem", str(error))
    yield _disk(config, commit)
    yield from _http(config, running)
    kind = config.source.kind
    cure = f"check [source.{kind}], and that what it names can be reached and read from here"
    yield from _looked_at("source", cure, lambda: _source(config, commit))
    cure = "check [serve.kafka], and that its topics can be read and written from here"
    yield from _looked_at("answers", cure, lambda: _answers(config))
    cure = "check [fleet] and [source.kafka], and that the topic can be read and written from here"
    yield from _looked_at("fleet", cure, lambda: _fleet(config))
    if config.training.shared:
        cure = "check [training] and model.device"
        yield from _looked_at("ranks", cure, lambda: _ranks(config, running))
    cure = "check [model], [method] and the archives of [evaluation]"
    yield from _looked_at("learner", cure, lambda: _learner(config, commit))
    cure = "`gapstream rollback N` sends readers to an older one, see `gapstream releases`"
    yield from _looked_at("release", cure, lambda: _release(config, commit))


def _looked_at(about: str, cure: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Give what the look finds; what it raises is a finding too, of whatever class: libraries have their own."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(about, "problem", str(error) if is_ours(error) else f"{type(error).__name__}: {error}", cure)


def _lock_holder(state: Path) -> str:
    """Give the process id of the agent that works on the state folder; empty when there is none."""
    try:
        file = (state / LOCK).open()
    except OSError:
        return ""
    with file:
        try:
            # Shared, so that two doctors at the same time do not take each other for an agent.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return file.read().strip() or "unknown"
    return ""


def _state(path: Path, running: str) -> Finding:
    folder = _existing(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            (Path(scratch) / "link").symlink_to("nothing")
    except OSError as error:
        who = f"user {os.geteuid()}"
        text = f"{folder} cannot be written with files and symlinks by {who}: {error.strerror or error}"
        return Finding("state", "problem", text, "give that user the folder, or set state.path to another one")
    if running:
        return Finding("state", "ok", f"{path}, an agent is running on it (process {running})")
    return Finding("state", "ok", f"{path}" + ("" if path.exists() else ", will be made"))


def _told(commit: Commit | None) -> str:
    if commit is None:
        return "none yet, learning begins at the start"
    intact = f"intact but for {', '.join(commit.damaged)}" if commit.damaged else "intact"
    if not commit.tasks:
        return f"{commit.number:06d} is {intact}: nothing learned yet, it holds where reading begins"
    return f"{commit.number:06d} is {intact}: {len(commit.classes)} classes after {commit.tasks} task(s)"


def _disk(config: Config, commit: Commit | None) -> Finding:
    """Compare the free space with what the agent may come to need beside what is there already."""
    folder = _existing(config.state.path)
    free = shutil.disk_usage(folder).free
    size = sum(file.stat().st_size for file in commit.path.rglob("*")) if commit else 0
    spool = config.spool.max_bytes - _size(config.state.path / SPOOL)
    text = f"{_mib(free)} free below {folder}"
    # Chosen by hand: the next commit may be larger than the last, and the first one cannot be measured yet.
    if free < 2 * size + 64 * 2**20:
        wanted = f"a commit has {_mib(size)} and the next one is written beside it"
        return Finding("disk", "problem", f"{text}; {wanted}", "free some space, or lower state.keep_commits")
    if free < 2 * size + spool:
        wanted = f"the spool may take {_mib(spool)} more"
        cure = "free some space, or lower spool.max_bytes; a full disk stops the agent"
        return Finding("disk", "warning", f"{text}; {wanted}", cure)
    return Finding("disk", "ok", text)


def _http(config: Config, running: str) -> Iterator[Finding]:
    host, port = config.http.host, config.http.port
    if not config.http.enabled or running:  # a running agent has the address itself
        return
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        text = f"{host}:{port} cannot be listened on: {error.strerror or error}"
        yield Finding("http", "problem", text, "set http.host and http.port to a free address")
    else:
        yield Finding("http", "ok", f"{host}:{port}" if port else f"{host}, any free port")


def _source(config: Config, commit: Commit | None) -> Iterator[Finding]:
    """Open the source and bring it to where the commit ends."""
    parts = source_parts(config)
    where = parts.place(config)
    with contextlib.closing(parts.source(config)) as source:
        if commit is not None and commit.fingerprint and not source.continues(commit.fingerprint):
            text = f"{where} is not the stream that {commit.path} was learned from, its offsets mean nothing here"
            yield Finding("source", "problem", text, "set [source] back to that stream, or state.path to a new folder")
            return
        offsets, epochs = (commit.offsets, commit.epochs) if commit else ({}, {})
        source.seek(offsets, epochs)
        at = ", ".join(f"{topic}/{number}:{offset}" for (topic, number), offset in sorted(source.positions.items()))
        yield Finding("source", "ok", f"{where}; read from {at or 'the beginning'}")
    if place := parts.dead_letter_place(config):
        try:
            parts.dead_letters(config, create=False).close()
        except DeadLetterError as error:
            if parts.may_create_dead_letters(config):
                text = f"{error}. The agent will try to create it"
                yield Finding("rejected", "warning", text, "create it yourself where the agent may not")
            else:
                yield Finding("rejected", "problem", str(error))
        else:
            yield Finding("rejected", "ok", f"{place} takes rejected records")


def _answers(config: Config) -> Iterator[Finding]:
    """Look at what `gapstream serve --kafka` needs, where that is configured."""
    section = config.serve.kafka
    if not section.topics:
        return
    from streams.kafka.exchange import TopicMissing

    try:
        open_exchange(config, create=False).close()
    except TopicMissing as error:
        if not (section.create and error.topics == [section.output]):
            raise
        text = f"{error}. `gapstream serve --kafka` will try to"
        yield Finding("answers", "warning", text, "create it yourself where that process may not")
    else:
        yield Finding("answers", "ok", f"{', '.join(section.topics)} can be answered in {section.output}")


def _fleet(config: Config) -> Iterator[Finding]:
    """Look at the topic of the fleet, where one is configured, and at what this site knows of the others."""
    name = config.fleet.topic
    if not name:
        return
    from agent.commands.fleet import age
    from streams.blobs import kept
    from streams.kafka.fleet import describe

    topic = describe(connection(config), name)
    if topic is None:
        cure = "create it yourself, with one partition and cleanup.policy=compact, where the agent may not"
        yield Finding("fleet", "warning", f"there is no topic {name}. The agent will try to create it", cure)
        return
    if topic.chunk_bytes <= 0:
        text = f"max.message.bytes of {name} is too small: a message has no room for a part of a state"
        yield Finding("fleet", "problem", text, "raise it to 1048588, the usual one")
    if topic.policy not in ("compact", ""):
        text = f"{name} has cleanup.policy={topic.policy}, which loses the states of sites that learn nothing for long"
        yield Finding("fleet", "warning", text, "set it to compact")
    if topic.partitions != 1:
        text = f"{name} has {topic.partitions} partitions, and a fleet uses one for each site"
        yield Finding("fleet", "warning", text, "one partition is enough for all of them")
    if topic.chunk_bytes <= 0:
        return
    now = time.time() * 1000
    others = [
        f"{site} (commit {blob.version}, {age((now - blob.sequence) / 1000)} old)"
        for site, (blob, _) in sorted(kept(config.state.path / FLEET).items())
    ]
    known = ", ".join(others) or "none that this site has a state of yet"
    size = (
        f"{topic.messages} message(s), at most {topic.chunk_bytes} bytes of a state each" if topic.messages else "empty"
    )
    yield Finding("fleet", "ok", f"{config.fleet.site} on {name} ({size}); other sites: {known}")


def _learner(config: Config, commit: Commit | None) -> Iterator[Finding]:
    """Set the learner up as the trainer does: weights, device, method, test archives, and what the commit holds."""
    import torch

    from agent.trainer import Trainer

    learned = commit.path if commit and has_learned(commit.path) else None
    # Without its ranks: those of a running agent have the address, and the trainer is what is looked at here.
    learner = Trainer(config.model_copy(update={"training": Training()}), learned).identity
    model = f"{learner.model.name} ({learner.model.pretrained})"
    yield Finding("learner", "ok", f"{learner.method} on {model}, device {learner.device}, torch {torch.__version__}")
    if learner.device == "cpu" and torch.cuda.is_available():
        yield Finding("learner", "warning", f"{torch.cuda.get_device_name()} is not used", "set model.device to auto")


def _ranks(config: Config, running: str) -> Iterator[Finding]:
    """Look at the devices of this machine's ranks, and whether others can join."""
    from agent.sharing.machine import device_of, threads_of
    from agent.sharing.start import secret_of

    settings = config.training
    secret_of(settings)
    devices = [device_of(config, number) for number in range(settings.processes)]
    own = f"{settings.processes} on this machine ({', '.join(devices)}; {threads_of(config)} CPU thread(s) each)"
    if not settings.listen:
        yield Finding("ranks", "ok", own)
        return
    if not running:  # a running agent has the address itself
        socket.create_server(parted(settings.listen)).close()
    yield Finding("ranks", "ok", f"{own}; others may join at {settings.listen}")


def _release(config: Config, commit: Commit | None) -> Iterator[Finding]:
    """Open the current release and let it test itself."""
    import onnxruntime
    import torch

    from agent.releases import pinned
    from exporter.runtime import Classifier

    if commit is None or commit.release is None:
        has = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
        yield Finding("release", "ok", f"none yet; onnxruntime {onnxruntime.__version__} was built for {has}")
        return
    classifier = Classifier(commit.release)
    release = classifier.release
    yield Finding(
        "release", "ok", f"{release.id}: {len(release.classes)} classes, passes its test on {classifier.provider}"
    )
    if (number := pinned(config.state.path)) is not None:
        text = f"readers are held at the release of commit {number}"
        yield Finding("release", "warning", text, "`gapstream rollback --newest` lets them follow it again")
    if torch.cuda.is_available() and classifier.provider == "CPUExecutionProvider":
        text = "torch can use the GPU and onnxruntime cannot, so releases are checked and served on the CPU"
        yield Finding("release", "warning", text, "install onnxruntime-gpu for the CUDA version of this torch")


def _existing(path: Path) -> Path:
    """Find the folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running agent deletes what it has learned
            total += file.stat().st_size
    return total


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
